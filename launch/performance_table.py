"""The figures of docs/performance/results.json as Markdown, beside their goals and those of the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table. goals, published: at 256px and at 768px; goals are upper bounds unless `at_least`."""

    key: str
    label: str
    unit: str
    goals: tuple[float, float] | None = None
    published: tuple[float, float] | None = None
    at_least: bool = False


ROWS = (
    Row("attention_tflops", "attention", "TFLOP/s", (600, 660), at_least=True),
    Row("cudnn_tflops", "attention, cuDNN", "TFLOP/s"),
    Row("attention_fp8_tflops", "attention in fp8", "TFLOP/s"),
    Row("forward_s", "forward, one pass", "s", (0.265, 7.6)),
    Row("torch_forward_s", "forward, three branches, eager PyTorch", "s", None, (0.974, 26.0)),
    Row("forward_fp8_s", "forward in fp8, one pass", "s", (0.19, 6.0)),
    Row("forward_fp8_products_s", "the same, attention in bf16", "s"),
    Row("t2v_exact_s", "text to video, exact", "s", (23, 620), (60, 1656)),
    Row("i2v_exact_s", "image to video, exact", "s", (32, 850)),
    Row("t2v_balanced_s", "text to video, balanced", "s", (13, 350)),
    Row("t2v_fast_s", "text to video, fast", "s", (8, 220)),
    Row("t2v_fast_fp8_s", "text to video, fast, in fp8", "s", (8, 220)),
    Row("t2v_fast_fp8_products_s", "the same, attention in bf16", "s", (8, 220)),
    Row("vae_decode_s", "VAE decode", "s", (0.4, 4), (1.46, 17.8)),
    Row("vae_decode_peak_gb", "VAE decode, peak beyond its weights", "GB", (8, 10), (22.8, 29.0)),
    Row("vae_decode_error", "its distance from XLA's convolutions", "relative"),
    Row("peak_gb", "peak memory", "GB", (30, 36), (52.5, 60.3)),
    Row("second_start_s", "second start, until the first step, beyond reading weights", "s", (15, 15)),
    Row("command_s", "a command from its start to the mp4, reading included", "s"),
    Row("t2v_24gb_s", "text to video, exact, offloaded in a card of 24 GB", "s"),
    Row("t2v_24gb_peak_gb", "its peak memory", "GB", (24, 24)),
    Row("t2v_40gb_s", "the same in a card of 40 GB", "s"),
    Row("t2v_40gb_peak_gb", "its peak memory", "GB", (40, 40)),
)


def table(results: Mapping[str, Any], sizes: Sequence[str]) -> str:
    """Figures beside goals and what is published, then the roofline, as Markdown."""
    there = [(place, size) for place, size in enumerate(sizes) if size in results]
    lines = [
        "| |" + "".join(f" {size} | goal | published |" for _, size in there),
        "|---|" + "---|---|---|" * len(there),
    ]
    for row in ROWS:
        cells = [f"{row.label}, {row.unit}"]
        for place, size in there:
            goal = row.goals and row.goals[place]
            sign = "≥" if row.at_least else "≤"
            cells += [_cell(results[size].get(row.key), goal, row.at_least)]
            cells += [f"{sign} {goal:g}" if goal else "", f"{row.published[place]:g}" if row.published else ""]
        lines.append(f"| {' | '.join(cells)} |")
    load = results.get("ceilings", {}).get("load_gb_per_s")
    if load and load["value"]:
        lines += ["", f"Reading the MMDiT from the disk's cache: {load['value']:.3g} GB/s (goal 2.5)."]
    lines += ["", "~: multiplied or summed, not measured as a whole. Bold: the goal is met.", ""]
    lines += ["| floor | TFLOP | GB | floor, s | due to | measured, s | gap |", "|---|---|---|---|---|---|---|"]
    for _, size in there:
        for stage, each in results[size].get("roofline", {}).items():
            work = f"| {stage} {size} | {each['operations'] / 1e12:.4g} | {each['bytes'] / 1e9:.3g} |"
            known = "floor_s" in each
            rest = (
                f" {each['floor_s']:.3g} | {each['bound']} | {each['seconds']:.3g} | {each['gap']:.2f} |"
                if known
                else ""
            )
            lines.append(work + (rest or " | | | |"))
    return "\n".join(lines)


def _cell(figure: Mapping[str, Any] | None, goal: float | None, at_least: bool) -> str:
    if figure is None or figure["value"] is None:
        return "–"
    text = f"{'' if figure['measured'] else '~'}{figure['value']:.4g}"
    met = goal is not None and (figure["value"] >= goal if at_least else figure["value"] <= goal)
    return f"**{text}**" if met else text
