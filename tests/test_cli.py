"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lyra
from lyra import StaticContext
from lyra.cli import application
from lyra.cli.options import numbers
from lyra.cli.output import head_list
from lyra.quantities import size

TEXT = "and the note of a hand, then that of the other"


def run(*arguments: object, input: str | None = None) -> Result:
    environment = {"COLUMNS": "100", "NO_COLOR": "1"}
    return CliRunner().invoke(application(), [str(argument) for argument in arguments], input=input, env=environment)


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    return result.stderr


@pytest.fixture(scope="module")
def book(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    path = tmp_path_factory.mktemp("book") / "book.safetensors"
    lyra.load(tiny_folder).capture(TEXT).save(path)
    return path


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_every_module_with_a_command_is_one() -> None:
    names = {item.callback.__name__ for item in application().registered_commands}
    assert {"split", "capture", "inspect", "generate", "score"} <= names
    assert len(application().registered_commands) == len(names)
    result = run("--help")
    assert all(name in result.stdout for name in names)
    assert run("--version").stdout.strip() == f"lyra {lyra.__version__}"


def test_the_entry_point_starts_without_a_framework() -> None:
    code = (
        "import sys\nfrom lyra.cli import application\napplication()\n"
        "print([name for name in ('torch', 'jax', 'transformers', 'hypothesis') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# split


def test_split_of_the_reference_case() -> None:
    result = run("split", "gemma-3-12b-lyra-8q4kv")
    assert result.exit_code == 0
    lyra_row, vanilla_row = (line for line in result.stdout.splitlines() if "8: " in line)
    assert [cell.strip() for cell in lyra_row.split("│")[1:7]] == [
        "lyra", "8: 8-15", "4: 4-7", "125.8 M", "62.9 M", "62.5 MiB",
    ]  # fmt: skip
    assert [cell.strip() for cell in vanilla_row.split("│")[1:4]] == ["vanilla", "8: 0-7", "4: 0-3"]
    stream = next(line for line in result.stdout.splitlines() if line.startswith("stream"))
    assert stream.split()[1:] == [*"vv│vv│vv│vv│LL│LL│LL│LL"]


def test_split_as_json(tmp_path: Path) -> None:
    path = tmp_path / "split.json"
    assert run("split", "gemma-3-12b", "--lyra-kv", 4, "--json", path).exit_code == 0
    data = json.loads(path.read_text())
    assert data == json.loads(run("split", "gemma-3-12b", "--lyra-q", "8-15", "--json", "-").stdout)
    lyra_stream = data["streams"]["lyra"]
    assert lyra_stream["q_heads"] == list(range(8, 16))
    assert lyra_stream["kv_heads"] == [4, 5, 6, 7]
    assert lyra_stream["q_and_o_parameters"] == 2 * 8 * 256 * 3840 * 8
    assert lyra_stream["k_and_v_parameters"] == 2 * 4 * 256 * 3840 * 8
    assert lyra_stream["static_cache_bytes_per_1000_tokens"] == 1000 * 2 * 4 * 256 * 4 * 8
    assert data["live_cache_bytes_per_1000_tokens"] == 2 * lyra_stream["static_cache_bytes_per_1000_tokens"]
    assert data["kv_aligned"]


def test_split_of_a_folder_a_gguf_file_and_a_toml_file(tiny_folder: Path, tiny_gguf: Path, tmp_path: Path) -> None:
    found = [json.loads(run("split", one, "--json", "-").stdout)["streams"] for one in (tiny_folder, tiny_gguf)]
    assert found[0] == found[1]
    assert found[0]["lyra"]["q_heads"] == [2, 3]
    layer = tmp_path / "layer.toml"
    lyra.ModelSpec.preset("gemma-3-4b").attention.to_toml(layer)
    one = json.loads(run("split", layer, "--lyra-kv", 1, "--json", "-").stdout)
    assert one["global_layers"] == 1
    assert one["streams"]["lyra"]["q_heads"] == [6, 7]


def test_a_cut_group_is_explained_and_allowed_on_request() -> None:
    message = refused("split", "gemma-3-270m", "--lyra-q", "2,3")
    assert "cuts a GQA group: KV head 0 is read by query heads [0, 1, 2, 3]" in message
    assert "Give --share-kv" in message
    result = run("split", "gemma-3-270m", "--lyra-q", "2,3", "--share-kv")
    assert result.exit_code == 0
    assert "KV heads 0 serve both streams" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gemma-3-12b", "--lyra-q", "16"), "there are no query heads 16; expected 0 to 15"),
        (("gemma-3-12b", "--lyra-kv", 9), "9 KV heads asked for, the layer has 8"),
        (("gemma-3-12b", "--lyra-q", "1,x"), "'x' is no number and no range"),
        (("gemma-3-12b", "--lyra-kv", 1, "--lyra-q", "1"), "give one of them"),
        (("gemma-3-3b",), "presets: gemma-3-12b"),
        (("missing.toml",), "'missing.toml' is neither a .toml file nor a preset"),
    ],
)
def test_an_illegal_split_says_why(arguments: tuple[object, ...], message: str) -> None:
    assert message in refused("split", *arguments)


# contexts


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_capture_writes_what_the_model_captures(source: str, book: Path, tiny_folder: Path, text_file: Path) -> None:
    output = text_file.with_name("out.safetensors")
    given, typed = (text_file, None) if source == "file" else ("-", TEXT)
    result = run("capture", given, output, "--model", tiny_folder, "--kv-heads", "1", "--layers", "3", input=typed)
    assert result.exit_code == 0, result.stderr
    found, whole = StaticContext.load(output), StaticContext.load(book)
    assert found.kv_heads == {3: (1,)}
    assert (found.layers[3].k == whole.layers[3].k[:, 1:]).all()
    assert f"{whole.num_tokens}" in result.stdout


def test_inspect_shows_what_is_in_a_context(book: Path) -> None:
    result = run("inspect", book)
    assert result.exit_code == 0
    assert "tiny-gemma" in result.stdout
    data = json.loads(run("inspect", book, "--json", "-").stdout)
    context = StaticContext.load(book)
    assert data["tokens"] == context.num_tokens
    assert data["layers"] == {"1": [0, 1], "3": [0, 1]}
    assert data["bytes"] == context.nbytes
    assert data["weights"] == {str(layer): digest for layer, digest in context.fingerprint.layers}
    key_norm, _ = data["norms"]["1"]
    assert key_norm == pytest.approx(float((context.layers[1].k ** 2).sum(axis=-1).mean() ** 0.5), rel=0.2)


def test_generate_prints_what_the_model_generates(book: Path, tiny_folder: Path) -> None:
    model = lyra.load(tiny_folder)
    plain = run("generate", "the hand", "-m", tiny_folder, "-n", 5)
    assert plain.exit_code == 0
    assert plain.stdout == model.generate("the hand", 5) + "\n"
    model.attach(book, lyra.HeadSplit.all(model.spec), live="none")
    options = ("--context", book, "--lyra-kv", 2, "--live", "none")
    assert (
        run("generate", "the hand", "-m", tiny_folder, "-n", 5, *options).stdout == model.generate("the hand", 5) + "\n"
    )


def test_generate_draws_as_the_model_does(tiny_folder: Path) -> None:
    drawn = ("--temperature", 1.2, "--top-k", 30, "--top-p", 0.9, "--seed", 8)
    expected = lyra.load(tiny_folder).generate("the hand", 9, temperature=1.2, top_k=30, top_p=0.9, seed=8)
    assert run("generate", "the hand", "-m", tiny_folder, "-n", 9, *drawn).stdout == expected + "\n"
    assert "give a temperature above 0" in refused("generate", "x", "-m", tiny_folder, "--seed", 8)


def test_score_compares_with_and_without_a_context(book: Path, tiny_folder: Path, text_file: Path) -> None:
    model = lyra.load(tiny_folder)
    plain = model.score(TEXT)
    model.attach(book)
    attached = model.score(TEXT)
    arguments = ("score", text_file, "-m", tiny_folder, "-c", book)
    data = json.loads(run(*arguments, "--json", "-").stdout)
    assert data["without context"]["mean_nll"] == plain.mean_nll
    assert data["with context"]["mean_nll"] == attached.mean_nll
    assert data["with context"]["tokens"] == plain.num_tokens
    assert f"{attached.mean_nll:.4f}" in run(*arguments).stdout


def test_commands_refuse_in_one_line(book: Path, tiny_folder: Path, other_folder: Path, text_file: Path) -> None:
    assert "known: jax, torch" in refused("generate", "x", "-m", tiny_folder, "-b", "mxnet")
    assert "no config.json" in refused("score", text_file, "-m", text_file.parent)
    assert "there is no such file" in refused("inspect", "missing.safetensors")
    assert "No such file" in refused("capture", "missing.txt", "out.safetensors", "-m", tiny_folder)
    assert "not global" in refused("capture", text_file, "out.safetensors", "-m", tiny_folder, "--layers", "0")
    message = refused("score", text_file, "-m", other_folder, "-c", book)
    assert "k and v projections" in message
    assert "override" in message
    cut = text_file.with_name("cut.safetensors")
    cut.write_bytes(book.read_bytes()[:-1])
    assert "cut short" in refused("inspect", cut)
    text_file.write_bytes(b"\xff\xfe\xfd")
    assert "no UTF-8 text" in refused("score", text_file, "-m", tiny_folder)


@pytest.mark.parametrize(
    "arguments",
    [
        ("capture", "text.txt", "nowhere/out.safetensors", "-m", "no-model"),
        ("capture", "text.txt", "out.safetensors", "--json", "nowhere/table.json", "-m", "no-model"),
        ("score", "text.txt", "--json", "nowhere/table.json", "-m", "no-model"),
        ("faults", "--json", "nowhere/verdicts.json", "--only", "no-fault"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(arguments: tuple[str, ...]) -> None:
    """Whatever else is wrong would come later: the model, the text, the faults are not looked for yet."""
    assert "there is no folder 'nowhere'" in refused(*arguments)


def test_a_script_of_one_command_refuses_in_one_line(text_file: Path) -> None:
    pytest.importorskip("matplotlib")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-P", "bench/calibration.py", text_file]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert ran.stderr.startswith(f"error: '{text_file}' is not JSON")
    assert len(ran.stderr.splitlines()) == 1


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, book: Path) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr("lyra.cli.inspect.context_tables", broken)
    assert isinstance(run("inspect", book).exception, ZeroDivisionError)


# what commands share


def test_lists_of_numbers() -> None:
    assert numbers("0,1,8-10", 11) == (0, 1, 8, 9, 10)
    assert numbers("", 11) == ()
    assert head_list((0, 1, 8, 9, 10)) == "0, 1, 8-10"
    assert head_list(()) == "none"


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (5 * 2**40, "5.0 TiB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text
