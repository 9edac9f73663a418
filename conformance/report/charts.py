"""Drawings of the page as inline SVG: the distribution of |Δ|/σ, and which heads go to Lyra."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lyra.spec.attention import AttentionSpec
from lyra.terminal import visible

WIDTH, HEIGHT, BASE, TOP = 560, 138, 100, 16
SMALL_WIDTH, SMALL_HEIGHT = 150, 22
TICKS = ((1 / 64, "1/64"), (1 / 16, "1/16"), (1 / 4, "1/4"), (1.0, "1"), (4.0, "4"), (16.0, "16"), (64.0, "64"))
HEAD, GAP, GROUP_GAP, GROUPS_A_LINE = 22, 3, 12, 8


def histogram_chart(counts: Sequence[int], edges: Sequence[float], limit: float, label: str) -> str:
    """A histogram over a logarithmic axis, the limit marked; bars beyond it are in the colour of failure."""
    bar = WIDTH / len(counts)
    top = max(counts, default=0) or 1
    parts = [_bars(counts, edges, limit, bar, BASE, BASE - TOP, top)]
    parts.append(f'<line class="axis" x1="0" y1="{BASE}" x2="{WIDTH}" y2="{BASE}"/>')
    for value, text in TICKS:
        x = _place(value, edges, bar)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="{BASE}" x2="{x:.1f}" y2="{BASE + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{BASE + 17}" text-anchor="middle">{text}</text>')
    x = _place(limit, edges, bar)
    parts.append(f'<line class="limit" x1="{x:.1f}" y1="2" x2="{x:.1f}" y2="{BASE}"/>')
    parts.append(f'<text class="limit" x="{x + 5:.1f}" y="12">limit {limit:g}</text>')
    parts.append(f'<text x="{WIDTH}" y="{BASE + 31}" text-anchor="end">|Δ|/σ, each comparison by its largest</text>')
    return _svg(WIDTH, HEIGHT, label, parts, "chart")


def small_histogram(counts: Sequence[int], edges: Sequence[float], limit: float, label: str) -> str:
    """The same histogram in the height of a line of text."""
    bar = SMALL_WIDTH / len(counts)
    bars = _bars(counts, edges, limit, bar, SMALL_HEIGHT - 1, SMALL_HEIGHT - 2, max(counts, default=0) or 1)
    x = _place(limit, edges, bar)
    lines = [
        f'<line class="axis" x1="0" y1="{SMALL_HEIGHT - 0.5}" x2="{SMALL_WIDTH}" y2="{SMALL_HEIGHT - 0.5}"/>',
        f'<line class="limit" x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{SMALL_HEIGHT}"/>',
    ]
    return _svg(SMALL_WIDTH, SMALL_HEIGHT, label, [bars, *lines], "small")


def head_map(spec: AttentionSpec) -> str:
    """Every KV head over the query heads that read it; Lyra heads filled and marked L, vanilla ones outlined, v.

    A KV head that serves both streams is outlined and says so.
    """
    lyra, group = set(spec.lyra_q_heads), spec.group_size
    cut = set(spec.split.cut_kv_heads) if spec.split else set()
    wide = group * HEAD + (group - 1) * GAP
    a_line = max(1, min(GROUPS_A_LINE, 24 // group, spec.num_key_value_heads))
    lines = -(-spec.num_key_value_heads // a_line)
    parts = []
    for kv_head in range(spec.num_key_value_heads):
        left, y = (kv_head % a_line) * (wide + GROUP_GAP), (kv_head // a_line) * 56
        kind = "kv both" if kv_head in cut else "kv"
        parts.append(f'<rect class="{kind}" x="{left}" y="{y + 1}" width="{wide}" height="16" rx="3"/>')
        name = f"KV {kv_head}" if group > 1 else f"{kv_head}"
        name += ", both" if kv_head in cut and group > 2 else ""
        parts.append(f'<text x="{left + wide / 2}" y="{y + 13}" text-anchor="middle">{name}</text>')
        for place in range(group):
            head, x = kv_head * group + place, left + place * (HEAD + GAP)
            kind, letter = ("lyra", "L") if head in lyra else ("vanilla", "v")
            parts.append(f'<rect class="{kind}" x="{x}" y="{y + 20}" width="{HEAD}" height="26" rx="3"/>')
            parts.append(f'<text class="{kind}" x="{x + HEAD / 2}" y="{y + 31}" text-anchor="middle">{head}</text>')
            parts.append(f'<text class="{kind}" x="{x + HEAD / 2}" y="{y + 42}" text-anchor="middle">{letter}</text>')
    label = f"query heads {sorted(lyra)} go to Lyra, of {spec.num_attention_heads}"
    return _svg(a_line * (wide + GROUP_GAP) - GROUP_GAP, lines * 56 - 8, label, parts, "heads")


def _bars(
    counts: Sequence[int], edges: Sequence[float], limit: float, bar: float, base: float, high: float, top: int
) -> str:
    """One bar a bin; a bin lies beyond the limit where its lower edge does."""
    drawn = []
    for index, count in enumerate(counts):
        if not count:
            continue
        beyond = index > 0 and edges[index - 1] >= limit
        height = max(1.0, count / top * high)
        below = f"from {edges[index - 1]:.3g}" if index else ""
        above = f"below {edges[index]:.3g}" if index < len(edges) else "or not finite"
        drawn.append(
            f'<rect class="{"beyond" if beyond else "within"}" x="{index * bar + 0.5:.1f}" y="{base - height:.1f}" '
            f'width="{bar - 1:.1f}" height="{height:.1f}"><title>{count:,} {f"{below} {above}".strip()}</title></rect>'
        )
    return "".join(drawn)


def _place(value: float, edges: Sequence[float], bar: float) -> float:
    """Where an edge stands on the axis; the first bin lies below the first edge."""
    return (1 + min(range(len(edges)), key=lambda i: abs(edges[i] - value))) * bar


def _svg(width: float, height: float, label: str, parts: Sequence[str], kind: str) -> str:
    inner = "".join(parts)
    return (
        f'<svg class="{kind}" role="img" aria-label="{escape(visible(label))}" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}">{inner}</svg>'
    )
