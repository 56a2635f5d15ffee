"""The table and the page of the DDPO comparison, from its recorded results."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks.markdown import grid, paragraph, where
from benchmarks.sizes_models import MODELS

NAMES = {"trl": "TRL", "diffalign": "diffalign", "bare": "bare denoiser"}
PARTS = ("rollout", "reward", "update", "iteration")
KEPT = (
    " All sides run with an allocator that keeps what is freed (`MALLOC_TRIM_THRESHOLD_` and its kin). By itself glibc"
    " gives large blocks back and asks for them anew in every pass, which costs processor time in the kernel."
)
BUSY = 1.1
"""Wall time above this multiple of processor time: something else had the processor."""

Results = dict[str, Any]
Answers = Sequence[dict[str, Any]]


def seconds(answers: Answers, part: str, clock: str) -> float:
    """Median seconds of a part of an iteration; 0 for a part that this side does not have."""
    return float(median(answer["parts"].get(part, {}).get(clock, 0.0) for answer in answers))


def ratio(first: Answers, second: Answers, part: str, clock: str) -> tuple[float, float, float]:
    """Median, lowest and highest of ``first / second``, round by round: neighbours share what the machine did."""
    ratios = [a["parts"][part][clock] / b["parts"][part][clock] for a, b in zip(first, second, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def clock_of(results: Results) -> str:
    """``cpu`` where others had the processor, else ``wall``.

    Several threads wait for one another as well, and that waiting counts: then it is always ``wall``.
    """
    answers = [answer for side in results["equal"].values() for answer in side]
    busy = median(answer["parts"]["iteration"]["wall"] / answer["parts"]["iteration"]["cpu"] for answer in answers)
    return "cpu" if results["machine"]["threads"] == 1 and busy > BUSY else "wall"


def table(results: Results) -> list[str]:
    """The compact table for the terminal."""
    clock = clock_of(results)
    lines = [
        f"{'':28}{'rollout':>9}{'reward':>9}{'update':>9}{'iteration':>11}{'images/s':>10}  ({_clock_name(clock)})"
    ]
    for key in ("equal", "best"):
        for side, answers in results[key].items():
            times = [seconds(answers, part, clock) for part in PARTS]
            name = f"{NAMES[side]}, micro-batch {answers[0]['micro_batch']}"
            cells = "".join(f"{value:>9.3f}" for value in times[:3])
            lines.append(f"{name:28}{cells}{times[3]:>11.3f}{results['setup']['images'] / times[3]:>10.2f}")
    for key in ("equal", "best") if results["best"] else ("equal",):
        values = [f"{part} {_ratio_text(results[key], part, clock)}" for part in ("rollout", "update", "iteration")]
        lines.append(f"TRL / diffalign, {key}: {', '.join(values)}")
    for side in results["equal"]:
        lines.append(f"denoiser calls, {NAMES[side]}: {_calls(results['equal'][side])}")
    return lines


def page(results: Results) -> str:
    """The page in Markdown."""
    parts = [_head(results), _equal(results), _best(results), _evidence(results), _where(results), _conditions(results)]
    parts += [_sized(size, found) for size, found in results.get("sizes", {}).items()]
    return "\n\n".join(parts) + "\n"


def _sized(size: str, results: Results) -> str:
    """The same at a real size: a section of its own, whose parts stand a level lower."""
    setup, ready = results["setup"], results["ready"]["diffalign"]
    kept = results.get("keep_freed", False)
    parts = [
        f"## At the size of {MODELS[size.removesuffix('-kept')].title}" + (", freed memory kept" if kept else ""),
        paragraph(
            f"Written by `python -m benchmarks.trl_ddpo --size {size.removesuffix('-kept')}"
            f"{' --keep-freed' if kept else ''} --iterations {len(results['equal']['bare'])}"
            f" --threads {results['machine']['threads']}` on {results['date']}. The real configuration of U-Net, text"
            f" encoder and autoencoder with random weights: a U-Net of {ready['parameters'] / 1e6:.0f} M parameters, of"
            f" which {ready['trainable']} in a LoRA of rank {setup['rank']}, the only one that TRL has. One iteration"
            f" samples {setup['images']} images of {setup['pixels']}×{setup['pixels']} pixels in {setup['steps']} steps"
            f" with guidance {setup['guidance_scale']:g}, scores their JPEG size, and makes one AdamW update. The best"
            " micro-batch was not looked for." + (KEPT if kept else "")
        ),
        *(part(results).replace("## ", "### ", 1) for part in (_equal, _evidence, _where, _conditions)),
    ]
    return "\n\n".join(parts)


def _clock_name(clock: str) -> str:
    return "processor seconds" if clock == "cpu" else "wall seconds"


def _ratio_text(sides: dict[str, Answers], part: str, clock: str) -> str:
    middle, low, high = ratio(sides["trl"], sides["diffalign"], part, clock)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def _calls(answers: Answers) -> str:
    return "; ".join(f"{count} × {kind}" for kind, count in answers[0]["calls"].items())


def _head(results: Results) -> str:
    setup, ready = results["setup"], results["ready"]["diffalign"]
    return "\n\n".join(
        [
            "# DDPO: diffalign and TRL side by side",
            paragraph(
                f"Written by `make bench ARGS='--iterations {len(results['equal']['bare'])} --threads"
                f" {results['machine']['threads']}'` on {results['date']}; every number is in"
                " [results/trl_ddpo.json](results/trl_ddpo.json), and how it is measured is in [README.md](README.md)."
            ),
            paragraph(
                "**The task.** A random Stable Diffusion of the real classes: a U-Net of"
                f" {ready['parameters'] / 1e6:.2f} M parameters, of which {ready['trainable']} in a LoRA of rank"
                f" {setup['rank']} on attention; 16×16 latents, 64×64 pixels. One iteration samples {setup['images']}"
                f" images in {setup['steps']} steps with guidance {setup['guidance_scale']:g}, scores their JPEG size,"
                f" and makes one AdamW update from all {setup['images'] * setup['steps']} denoising steps, guided as"
                " when sampled."
            ),
        ]
    )


def _equal(results: Results) -> str:
    clock, sides, images = clock_of(results), results["equal"], results["setup"]["images"]
    gflop = sum(results["ready"]["bare"]["gflop"].values())
    rows = []
    for side, answers in sides.items():
        times = [seconds(answers, part, clock) for part in PARTS]
        over = ratio(answers, sides["bare"], "iteration", clock)[0] - 1
        peak = max(answer["peak_mb"] for answer in answers)
        row = [NAMES[side], *(f"{value:.3f}" for value in times), f"{images / times[3]:.2f}", f"{over:+.1%}"]
        rows.append([*row, f"{gflop / times[3] / _ceiling(results):.0%}", f"{peak:.0f} MB"])
    speed = "; ".join(f"{part} {_ratio_text(sides, part, clock)}" for part in ("rollout", "update", "iteration"))
    return "\n\n".join(
        [
            f"## The same work: micro-batch {results['setup']['micro_batch']}",
            paragraph(
                f"Medians of {len(sides['bare'])} iterations after a warm-up, in {_clock_name(clock)}. *Over bare* is"
                " the time beyond the same denoiser calls without anything around them, median of the rounds; *of"
                " ceiling* is the denoiser's arithmetic as a share of what a large matrix product reaches."
            ),
            grid(["", *PARTS, "images/s", "over bare", "of ceiling", "peak memory"], rows),
            paragraph(
                "TRL's time divided by ours, median of the rounds (lowest–highest); above 1, we are faster:"
                f" **{speed}**."
            ),
        ]
    )


def _best(results: Results) -> str:
    clock, sides, images = clock_of(results), results["best"], results["setup"]["images"]
    title = "## Each side at its best micro-batch"
    if not sides:
        return f"{title}\n\nNot measured in this run."
    rows = []
    for side, answers in sides.items():
        times = [seconds(answers, part, clock) for part in PARTS]
        name = f"{NAMES[side]}, micro-batch {answers[0]['micro_batch']}"
        rows.append([name, *(f"{value:.3f}" for value in times), f"{images / times[3]:.2f}"])
    tried = "; ".join(
        f"{NAMES[side]} " + ", ".join(f"{size}: {value:.2f}" for size, value in found.items())
        for side, found in results["tried"].items()
    )
    text = (
        f"Medians of {len(sides['trl'])} iterations, taken after those above: compare within a table, not across."
        f" TRL's time divided by ours: **iteration {_ratio_text(sides, 'iteration', clock)}**. TRL's micro-batch"
        f" holds one step each of different images, so {images} is its largest here; ours holds any steps of"
        f" any images. The best was chosen from one update each, in processor seconds by micro-batch: {tried}."
    )
    return "\n\n".join([title, grid(["", *PARTS, "images/s"], rows), paragraph(text)])


def _evidence(results: Results) -> str:
    rows = []
    for side, answers in results["equal"].items():
        warm = results["warm_up"][side][0]
        reward = f"{warm['reward_mean']:.3f} ± {warm['reward_std']:.3f} kB" if "reward_mean" in warm else "–"
        rows.append([NAMES[side], _calls(answers), reward])
    text = (
        "Calls are counted by hooks on the denoiser in every measured iteration, a backward pass where a"
        " gradient reached its output. The run fails where they differ from what the settings ask for, or where the"
        " rewards of the untrained model (mean ± standard deviation over the images; both adapters start at zero)"
        " differ by more than four standard errors."
    )
    calls = grid(["", "denoiser calls in each iteration", "reward before training"], rows)
    return "\n\n".join(["## That it is the same work", calls, paragraph(text)])


def _where(results: Results) -> str:
    clock, sides = clock_of(results), results["equal"]
    rows = []
    for part in ("rollout", "update"):
        added = (
            median(
                answer["parts"][part][clock] - bare["parts"][part][clock]
                for answer, bare in zip(sides[side], sides["bare"], strict=True)
            )
            for side in ("trl", "diffalign")
        )
        rows.append([part, f"{seconds(sides['bare'], part, clock):.3f} s", *(f"{value:+.3f} s" for value in added)])
    gflop, size = results["ready"]["bare"]["gflop"], results["setup"].get("matmul", 1024)
    text = (
        f"The denoiser's arithmetic is {gflop['rollout']:.0f} GFLOP a rollout and {gflop['update']:.0f} GFLOP"
        f" an update, as torch counts it; a {size}×{size} float32 matrix product ran at"
        f" {_ceiling(results):.0f} GFLOP/s in the same run. What is added to a rollout is the"
        " text encoder, the decoder of the images, noise and log-densities; to an"
        " update, gathering rows, the loss and the optimiser. A negative number is the noise of the measurement."
    )
    added_to = grid(["", "the denoiser alone", "what TRL adds", "what diffalign adds"], rows)
    return "\n\n".join(["## Where the time goes", added_to, paragraph(text)])


def _ceiling(results: Results) -> float:
    clock = clock_of(results)
    return float(median(answer["matmul_gflops"][clock] for answer in results["equal"]["bare"]))


def _conditions(results: Results) -> str:
    machine, answers = results["machine"], [answer for side in results["equal"].values() for answer in side]
    walls, cpus = ([answer["parts"]["iteration"][clock] for answer in answers] for clock in ("wall", "cpu"))
    text = where(machine, results["ready"]["trl"]["versions"])
    busy = (
        f"**Other work ran on this machine**: an iteration took {median(walls):.1f} s of wall time (from"
        f" {min(walls):.1f} to {max(walls):.1f}) for {median(cpus):.1f} s of processor time; load average"
        f" {machine['load_average'][0]:g}. All times on this page are therefore processor"
        " seconds: they leave out the time in which others had the processor, though not the caches that others"
        " emptied. Read the ratios, not the seconds."
        if clock_of(results) == "cpu"
        else f"Load average at the start: {machine['load_average'][0]:g}; an iteration took {median(walls):.1f} s of"
        f" wall time (from {min(walls):.1f} to {max(walls):.1f}) for {median(cpus):.1f} s of processor time."
    )
    return "\n\n".join(["## Conditions", paragraph(text), paragraph(busy)])
