"""Bad command lines: each is refused in words, with exit code 2, before its work, and nothing in the folder changes."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lyra
from lyra.cli import application

TEXT = "and the note of a hand, then that of the other"
HUGE = "99999999999999999999"
LOADED = ("-m", "tiny")

LINES: dict[str, list[tuple[str, str]]] = {
    "files that would be destroyed": [
        ("inspect book.safetensors --json book.safetensors", "the command reads it"),
        ("inspect book.safetensors --json ./sub/../book.safetensors", "which is 'book.safetensors'"),
        ("inspect book.safetensors --json hard.safetensors", "which is 'book.safetensors'"),
        ("inspect soft.safetensors --json book.safetensors", "which is 'soft.safetensors'"),
        ("capture text.txt text.txt -m tiny", "the command reads it"),
        ("capture text.txt out.safetensors --json text.txt -m tiny", "the command reads it"),
        ("capture text.txt out.safetensors --json out.safetensors -m tiny", "two outputs would be one file"),
        ("capture text.txt OUT.safetensors --json out.safetensors -m tiny", "two outputs would be one file"),
        ("capture text.txt tiny/model.safetensors -m tiny", "the command reads it"),
        ("capture text.txt out.safetensors --split split.toml --json split.toml -m tiny", "the command reads it"),
        ("score text.txt --json text.txt -m tiny", "the command reads it"),
        ("score text.txt -c book.safetensors --json book.safetensors -m tiny", "the command reads it"),
        ("score text.txt --json tiny/config.json -m tiny", "the command reads it"),
        ("split split.toml --json split.toml", "the command reads it"),
        ("split gemma-3-12b --split split.toml --json split.toml", "the command reads it"),
        ("split tiny --json tiny/config.json", "the command reads it"),
        ("split tiny --json tiny/tokenizer.json", "the command reads it"),
        ("split gemma-3-12b --json a.svg --svg a.svg", "two outputs would be one file"),
        ("choose tiny --texts text.txt --json text.txt", "the command reads it"),
        ("choose tiny --texts sub --json sub/one.txt", "the command reads it"),
        ("choose tiny -o a.toml --json a.toml", "two outputs would be one file"),
        ("choose tiny --plot a.png --plot a.png", "two outputs would be one file"),
        ("gqa params tiny --json tiny/config.json", "the command reads it"),
        ("gqa cache split.toml --json split.toml", "the command reads it"),
        ("gqa perplexity text.txt --json text.txt", "the command reads it"),
        ("gqa perplexity text.txt --plot a.png --curves a.png", "two outputs would be one file"),
        ("gqa uptrain text.txt --json text.txt", "the command reads it"),
        ("bench --from report.json --json report.json", "the command reads it"),
        ("bench --from report.json --page report.json", "the command reads it"),
        ("merge report.json --json report.json", "the command reads it"),
        ("conform --spec split.toml --json split.toml", "the command reads it"),
        ("conform --replay report.json --json report.json", "the command reads it"),
        ("conform --json a.x --junit a.x", "two outputs would be one file"),
    ],
    "files that cannot be written": [
        ("inspect book.safetensors --json sub", "it is a folder"),
        ("inspect book.safetensors --json .", "it is a folder"),
        ("inspect book.safetensors --json ''", "it is a folder"),
        ("inspect book.safetensors --json nowhere/x.json", "there is no folder 'nowhere'"),
        ("inspect book.safetensors --json text.txt/x.json", "is a file and no folder"),
        ("inspect book.safetensors --json " + "x" * 300, "name too long"),
        ("inspect book.safetensors --json ring", "symbolic links"),
        ("capture text.txt sub -m tiny", "it is a folder"),
        ("capture text.txt out.safetensors --json sub -m tiny", "it is a folder"),
        ("capture text.txt /dev/null -m tiny", "a context is a file"),
        ("capture text.txt nowhere/out.safetensors -m tiny", "there is no folder 'nowhere'"),
        ("score text.txt --json sub -m tiny", "it is a folder"),
        ("split gemma-3-12b --json sub", "it is a folder"),
        ("split gemma-3-12b --svg sub.svg", "it is a folder"),
        ("split gemma-3-12b --svg nowhere/a.svg", "there is no folder 'nowhere'"),
        ("split gemma-3-12b --svg a.png", "must end in .svg"),
        ("split gemma-3-12b --png a.svg", "must end in .png"),
        ("choose tiny -o text.txt/a.toml", "is a file and no folder"),
        ("choose tiny -o a.txt", "splits in .toml"),
        ("choose tiny --plot a.pdf", "pictures end in"),
        ("choose tiny --progress text.txt", "is a file and no folder"),
        ("gqa params gemma-3-12b --plot a.pdf", "must end in .png or .svg"),
        ("gqa params gemma-3-12b --json sub", "it is a folder"),
        ("gqa cache gemma-3-12b --plot sub.svg", "it is a folder"),
        ("gqa presets --json nowhere/a", "there is no folder 'nowhere'"),
        ("gqa perplexity --checkpoints text.txt", "is a file and no folder"),
        ("gqa perplexity --curves a.gif", "must end in .png or .svg"),
        ("gqa uptrain --plot a", "must end in .png or .svg"),
        ("gqa speed --plot nowhere/a.png", "there is no folder 'nowhere'"),
        ("bench --json sub", "it is a folder"),
        ("bench --page nowhere/a.md", "there is no folder 'nowhere'"),
        ("bench --from report.json --page pages/a.md", "is a file and no folder"),
        ("conform --json sub", "it is a folder"),
        ("conform --list --json sub", "it is a folder"),
        ("faults --json sub", "it is a folder"),
        ("merge report.json --report nowhere/a.html", "there is no folder 'nowhere'"),
    ],
    "options without effect": [
        ("generate x --gate 1 -m tiny", "--gate would have no effect"),
        ("generate x --split split.toml -m tiny", "--split would have no effect"),
        ("generate x --live none -m tiny", "--live would have no effect"),
        ("generate x --positions overlay -m tiny", "--positions would have no effect"),
        ("generate x --lyra-kv 1 --override -m tiny", "--lyra-kv and --override would have no effect"),
        ("generate x --lyra-q 1 -m tiny", "--lyra-q would have no effect"),
        ("generate x --mode sequential -m tiny", "--mode would have no effect"),
        ("generate x -c book.safetensors --gate 1 -m tiny", "give --mode sequential"),
        ("generate x -c book.safetensors --share-kv -m tiny", "--share-kv would have no effect"),
        ("generate x --top-k 3 -m tiny", "top_k would have no effect"),
        ("generate x --top-p 0.5 --seed 1 -m tiny", "top_p and seed would have no effect"),
        ("score text.txt --gate 0.5 -m tiny", "--gate would have no effect"),
        ("score text.txt --live self --positions continue -m tiny", "--live and --positions would have no effect"),
        ("score text.txt --mode sequential -m tiny", "--mode would have no effect"),
        ("score text.txt --override -m tiny", "--override would have no effect"),
        ("capture text.txt out.safetensors --split split.toml --layers 1 -m tiny", "leave out --layers"),
        ("split gemma-3-12b --share-kv", "--share-kv would have no effect"),
        ("split gemma-3-12b --lyra-kv 1 --share-kv", "--share-kv would have no effect"),
        ("split gemma-3-12b --lyra-kv 1 --lyra-q 1", "give one of them"),
        ("split gemma-3-12b --lyra-kv 1 --split split.toml", "give one of them"),
        ("gqa params gemma-3-12b --heads 3", "leave out --heads"),
        ("gqa cache --context", "--context would have no effect"),
        ("gqa cache gemma-3-12b --presets", "name no model"),
        ("bench --list --json a.json", "--json would have no effect"),
        ("bench --list --threads 1 --margin 2", "--margin and --threads would have no effect"),
        ("bench --from report.json --only decode", "--only would have no effect"),
        ("bench --from report.json --quick --threads 2", "--quick and --threads would have no effect"),
        ("bench --from report.json --row-limit 3", "--row-limit would have no effect"),
        ("split gemma-3-12b --lyra-kv 1 --lyra-kv 2", "'--lyra-kv': it is given twice"),
        ("inspect book.safetensors --json a --json b", "'--json': it is given twice"),
        ("generate x -n 3 --max-new-tokens 4 -m tiny", "it is given twice"),
        ("gqa perplexity --speed --no-speed", "it is given twice"),
    ],
    "numbers": [
        (f"generate x -n {HUGE} -m tiny", "Invalid value for"),
        ("generate x -n -1 -m tiny", "Invalid value for"),
        ("generate x -n 1.5 -m tiny", "Invalid value for"),
        ("generate x -n '' -m tiny", "Invalid value for"),
        ("generate x -t nan -m tiny", "Invalid value for"),
        ("generate x -t inf -m tiny", "inf is no finite number"),
        ("generate x -t -1 -m tiny", "Invalid value for"),
        ("generate x -t 1 --top-k 0 -m tiny", "Invalid value for"),
        ("generate x -t 1 --top-p nan -m tiny", "Invalid value for"),
        ("generate x -t 1 --top-p 2 -m tiny", "Invalid value for"),
        ("generate x -t 1 --seed -1 -m tiny", "Invalid value for"),
        (f"generate x -t 1 --seed {HUGE} -m tiny", "Invalid value for"),
        ("generate x -c book.safetensors --mode sequential --gate nan -m tiny", "nan is no finite number"),
        ("generate x -c book.safetensors --lyra-q 0-99999999999 -m tiny", "there are no query heads 0-99999999999"),
        (f"generate x -c book.safetensors --lyra-kv {HUGE} -m tiny", "the layer has 2"),
        ("score text.txt -c book.safetensors --lyra-kv -1 -m tiny", "-1 KV heads asked for"),
        ("capture text.txt out.safetensors --layers 1-99999999999 -m tiny", "there are no layers 1-99999999999"),
        ("capture text.txt out.safetensors --kv-heads 0-99999999999 -m tiny", "there are no KV heads 0-99999999999"),
        (f"capture text.txt out.safetensors --layers {HUGE} -m tiny", "is no number and no range"),
        ("capture text.txt out.safetensors --layers -1 -m tiny", "is no number and no range"),
        ("capture text.txt out.safetensors --kv-heads 1-0 -m tiny", "write 0-1"),
        ("capture text.txt out.safetensors --layers '' -m tiny", "--layers names none"),
        ("capture text.txt out.safetensors --kv-heads , -m tiny", "--kv-heads names none"),
        ("capture text.txt out.safetensors --chunk-size 0 -m tiny", "Invalid value for"),
        (f"capture text.txt out.safetensors --chunk-size {HUGE} -m tiny", "Invalid value for"),
        ("split gemma-3-12b --lyra-q 0-99999999999", "expected 0 to 15"),
        ("split gemma-3-12b --lyra-q " + "9" * 5000, "is no number and no range"),
        ("split gemma-3-12b --lyra-q 3-1", "write 1-3"),
        ("split gemma-3-12b --lyra-q ½", "is no number and no range"),
        (f"split gemma-3-12b --lyra-kv {HUGE}", "the layer has 8"),
        ("split gemma-3-12b --lyra-kv x", "Invalid value for"),
        ("choose tiny --heads 0", "Invalid value for"),
        (f"choose tiny --heads {HUGE} --texts sub", "has 1 to 8 to choose from"),
        ("choose tiny --context-tokens -5", "Invalid value for"),
        (f"choose tiny --live-tokens {HUGE}", "Invalid value for"),
        ("gqa params --heads 0 --width 8", "Invalid value for"),
        (f"gqa params --heads {HUGE} --width {HUGE}", "Invalid value for"),
        ("gqa params --heads 3 --width 8", "head_dim"),
        ("gqa params --heads 4", "give --heads and --width"),
        ("gqa cache --batch 0", "Invalid value for"),
        ("gqa cache --dtype float7", "float7"),
        (f"gqa presets --tokens {HUGE}", "Invalid value for"),
        ("gqa presets --dtype ''", "dtype is ''"),
        (f"gqa perplexity --heads {HUGE}", "Invalid value for"),
        ("gqa perplexity --kv-heads 0-99999999999", "expected 0 to 8"),
        ("gqa perplexity --kv-heads ''", "no KV heads are named"),
        ("gqa perplexity --kv-heads 3", "not a multiple"),
        ("gqa uptrain --kv-heads ,", "no KV heads to convert to are named"),
        ("gqa perplexity --seeds 0", "Invalid value for"),
        (f"gqa perplexity --steps {HUGE}", "Invalid value for"),
        ("gqa perplexity --vocabulary 3", "Invalid value for"),
        ("gqa uptrain --kv-heads 1-99999999999", "expected 0 to 8"),
        ("gqa uptrain --uptraining 0", "Invalid value for"),
        ("gqa speed --kv-heads 3", "3"),
        ("gqa speed --kv-heads 0", "0"),
        ("gqa speed --kv-heads ''", "no KV heads are named"),
        (f"gqa speed --tokens {HUGE}", "Invalid value for"),
        ("gqa speed --threads -1", "Invalid value for"),
        (f"bench --threads {HUGE} --only frame", "Invalid value for"),
        ("bench --margin nan", "Invalid value for"),
        ("bench --row-limit 0", "Invalid value for"),
    ],
    "names": [
        ("generate '' -m ''", "got ''"),
        ("generate x -m nowhere", "there is no model 'nowhere'"),
        ("generate x -m text.txt", "text.txt"),
        ("generate x -m sub", "it has no config.json"),
        ("generate x -m tiny -b mxnet", "known: jax, torch"),
        ("generate x -m tiny -b ''", "known: jax, torch"),
        ("generate x -m tiny --dtype float7", "float7"),
        ("generate x -m tiny --mode upside-down", "upside-down"),
        ("generate x -m tiny -c nowhere.safetensors", "there is no such file"),
        ("generate x -m tiny -c sub", "sub"),
        ("generate x -m tiny -c text.txt", "text.txt"),
        ("generate x -m tiny -c book.safetensors --split nowhere.toml", "nowhere.toml"),
        ("generate x -m tiny -c book.safetensors --split ''", "''"),
        ("score nowhere.txt -m tiny", "nowhere.txt"),
        ("score sub -m tiny", "sub"),
        ("score noise -m tiny", "no UTF-8 text"),
        ("score empty -m tiny", "at least 2 tokens"),
        ("capture noise out.safetensors -m tiny", "no UTF-8 text"),
        ("capture text.txt out.safetensors -m tiny --store float7", "float7"),
        ("inspect nowhere.safetensors", "there is no such file"),
        ("inspect sub", "sub"),
        ("inspect text.txt", "text.txt"),
        ("inspect empty", "empty"),
        ("inspect [/nope]", "[/nope]"),
        ("inspect \x1b[31mred", r"\x1b[31mred"),
        ("split nowhere", "is no folder, no .gguf and no .toml file"),
        ("split ''", "is no folder, no .gguf and no .toml file"),
        ("split sub", "it has no config.json"),
        ("split noise.toml", "noise.toml"),
        ("split empty.toml", "empty.toml"),
        ("split noise.gguf", "noise.gguf"),
        ("split [/nope]", "[/nope]"),
        ("split ~nobody-of-this-name/model", "nobody-of-this-name"),
        ("split gemma-3-12b --split noise.toml", "noise.toml"),
        ("choose nowhere --texts text.txt", "there is no model 'nowhere'"),
        ("choose tiny --texts nowhere", "nowhere"),
        ("choose tiny --texts empty-folder", "has no file that ends in"),
        ("choose tiny --texts text.txt", "give two or more"),
        ("choose tiny --texts text.txt --texts text.txt", "named twice"),
        ("choose tiny --texts noise --texts text.txt", "no UTF-8 text"),
        ("choose tiny --objective fame", "fame"),
        ("gqa params nowhere", "is no folder"),
        ("gqa cache noise.toml", "noise.toml"),
        ("gqa cache layer.toml", "describes one layer"),
        ("gqa perplexity nowhere.txt", "nowhere.txt"),
        ("gqa perplexity sub", "sub"),
        ("gqa perplexity empty", "Give a longer text"),
        ("gqa perplexity -b mxnet", "mxnet"),
        ("gqa speed -b ''", "no backend ''"),
        ("bench --only nothing", "no row begins with 'nothing'"),
        ("bench --only ''", "no row begins with ''"),
        ("bench --from nowhere.json", "nowhere.json"),
        ("bench --from noise", "holds no results"),
        ("bench --from empty", "holds no results"),
        ("bench --from report.json --from deep.json", "deep.json holds no results"),
        ("schema nothing", "nothing"),
        ("nothing", "No such command"),
        ("split gemma-3-12b more", "unexpected extra argument"),
    ],
}
"""By kind: command lines, and what the message has to say."""

ALL = [pytest.param(line, said, id=f"{line[:70]!a}") for lines in LINES.values() for line, said in lines]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A folder with a model, a context, a split and texts, and with files that are none of these."""
    pytest.importorskip("torch")
    here = tmp_path_factory.mktemp("errors")
    shutil.copytree(tiny_folder, here / "tiny")
    model = lyra.load(here / "tiny")
    model.capture(TEXT).save(here / "book.safetensors")
    os.link(here / "book.safetensors", here / "hard.safetensors")
    (here / "soft.safetensors").symlink_to("book.safetensors")
    (here / "ring").symlink_to("ring")
    (here / "text.txt").write_text(TEXT, encoding="utf-8")
    model.spec.with_split(lyra.HeadSplit.half(model.spec)).to_toml(here / "split.toml")
    model.spec.attention.to_toml(here / "layer.toml")
    for name in ("noise", "noise.toml", "noise.gguf"):
        (here / name).write_bytes(b"\xff\xfe\x00noise")
    for name in ("empty", "empty.toml"):
        (here / name).touch()
    for name in ("sub", "sub.svg", "sub.toml", "empty-folder", "pages"):
        (here / name).mkdir()
    (here / "pages" / "images").touch()
    for name in ("one.txt", "two.txt"):
        (here / "sub" / name).write_text(TEXT, encoding="utf-8")
    (here / "report.json").write_text(MEASURED, encoding="utf-8")
    (here / "deep.json").write_text("[" * 100_000, encoding="utf-8")
    return here


MEASURED = (
    '{"machine": {"processor": "p", "threads": 1, "versions": {}, "rates": {"bandwidth": 1, "float32": 1, '
    '"bfloat16": 1}}, "results": []}'
)


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LYRA_CACHE", str(folder.parent / "cache"))
    return folder


def words(line: str) -> list[str]:
    """The arguments of a line: '' is an empty one."""
    return ["" if word == "''" else word for word in line.split(" ")]


def run(line: str) -> Result:
    return CliRunner().invoke(application(), words(line), env={"COLUMNS": "400", "NO_COLOR": "1"})


def contents(folder: Path) -> dict[str, str]:
    """What is in the folder, with a digest of every file."""
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture(scope="module")
def before(folder: Path) -> dict[str, str]:
    return contents(folder)


@pytest.mark.parametrize(("line", "said"), ALL)
def test_a_bad_command_line_is_refused_and_changes_nothing(
    line: str, said: str, here: Path, before: dict[str, str]
) -> None:
    result = run(line)
    assert result.exit_code == 2, (result.exception, result.output)
    assert result.stdout == ""
    told = " ".join(result.stderr.replace("│", " ").split())
    assert said in told
    assert "\x1b" not in told
    assert "Traceback" not in told
    if "Usage:" not in told:
        assert told.startswith("error: ")
        assert len(result.stderr.splitlines()) == 1
    assert contents(here) == before
