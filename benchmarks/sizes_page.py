"""The page of the sizes that people use, from its recorded results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.markdown import grid, paragraph
from benchmarks.sizes_models import Settings

Found = dict[str, Any]


def seconds(found: Found, part: str, clock: str = "wall") -> float:
    """Median seconds of a part of the timed iterations; of the whole where the part is ``iteration``."""
    parts = ("rollout", "reward", "update") if part == "iteration" else (part,)
    return float(median(sum(answer["parts"][one][clock] for one in parts) for answer in found["timed"]))


def clock(found: Found) -> str:
    """``cpu`` where others had the processor: then even a matrix product had less of it than its threads could use."""
    threads = found["machine"]["threads"]
    used = median(answer["matmul"]["wall"] / answer["matmul"]["cpu"] for answer in found["timed"])
    return "cpu" if not found["ready"]["accelerator"] and used < 0.9 * threads else "wall"


def ceiling(found: Found) -> float:
    """Floating-point operations of the matrix product in a second of that clock: median over the timed iterations."""
    return float(median(answer["matmul"][clock(found)] for answer in found["timed"]))


def share(found: Found, part: str) -> float:
    """What a part achieved of the ceiling, each iteration against the product that followed it."""
    flop, told = found["counted"]["flop"][part], clock(found)
    return float(median(flop / answer["parts"][part][told] / answer["matmul"][told] for answer in found["timed"]))


def memory(found: Found) -> dict[str, float]:
    """Megabytes that the model and its training take: the device's, or this process's beyond the libraries'."""
    ready, timed = found["ready"], found["timed"]
    start = ready["start_mb"]
    return {
        "estimate": sum(found["estimate_mb"].values()),
        "loading": ready["loading_peak_mb"] - start,
        "live": max(answer["live_mb"] for answer in timed) - ready["start_live_mb"],
        "rollout": max(answer["peak_mb"]["rollout"] for answer in timed) - start,
        "update": max(answer["peak_mb"]["update"] for answer in timed) - start,
    }


def page(results: Sequence[Found]) -> str:
    """The page in Markdown."""
    notes = [f"- **{one}**: {note}." for one, note in {f["title"]: f["note"] for f in results if f["note"]}.items()]
    parts = [
        "# An iteration of DDPO at the sizes that people use",
        paragraph(
            "Written by `python -m benchmarks.sizes`; every number is in [results/sizes.json](results/sizes.json), and"
            " how it is measured is in [README.md](README.md). **The weights are random**: seconds and memory do not"
            " depend on what they are, and nothing here says that training helps. Classes and configurations are those"
            " of the published checkpoints, text encoders and autoencoder included, but for this:"
        ),
        "\n".join(notes) or "- nothing",
        "## Time",
        paragraph(
            "One iteration samples the images, scores their JPEG size, and makes one AdamW update of a LoRA on"
            " attention from every step that has noise. Medians in wall seconds. *Of ceiling* is what torch's"
            " `FlopCounterMode` counts of all operations of that part (decoding and what checkpointing makes again are"
            " among them), divided by its seconds and by what a large matrix product reached in the same"
            " precision right after the iteration, in the same process. Where others had the processor (see the"
            " conditions) both are by processor seconds, which are given in parentheses; the ceiling is then that of"
            " one processor."
        ),
        grid(
            ["", "denoiser", "LoRA", "pixels", "images × steps", "rollout", "update", "images/s", "TFLOP", "of ceiling,"
             " rollout", "of ceiling, update", "ceiling"],
            [_time(found) for found in results],
        ),
        "## Memory",
        paragraph(
            "In GB (10⁹ bytes) beyond what the process had with its libraries before the model was loaded. *Estimate*"
            " is what `--dry-run` says, by its own function, for these settings. It claims to count what is there when"
            " a backward pass begins, which is *live*: what the C library's allocator has given out at that moment, and"
            " on a GPU torch's. The *peaks* are of resident memory, and on a GPU of what torch has allocated: they hold"
            " what layers need while they compute, too, and on a CPU what the allocator keeps of what was freed."
            " Loading comes before all else; its peak is not part of the others. Weights in the precision that they"
            " were saved in (bf16, on a CPU) are mapped from their files: they are resident once they are used, so they"
            " are in the peaks of rollout and update, and not in *live*, which is no measure of the estimate then."
        ),
        grid(
            ["", "estimate", "live", "live / estimate", "peak of update", "peak / estimate", "peak of rollout",
             "peak of loading"],
            [_memory(found) for found in results],
        ),
        paragraph("What the estimate is made up of, in GB:"),
        grid(["", *(names := _names(results))], [_parts(found, names) for found in results]),
        "## Conditions",
        *(paragraph(_conditions(found)) for found in results),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def name(found: Found) -> str:
    """The model, its precision, and what else tells two rows apart."""
    settings = found["ready"]["settings"]
    plain = asdict(Settings())
    others = [name for name in ("device", "pixels", "images", "steps", "micro_batch", "rank")
              if settings[name] != plain[name]]  # fmt: skip
    extra = [f"{name.replace('_', '-')} {settings[name]}" for name in others]
    extra += ["checkpointed"] if settings["gradient_checkpointing"] else []
    return ", ".join([found["title"], settings["precision"], *extra])


def _time(found: Found) -> list[str]:
    ready, settings = found["ready"], found["ready"]["settings"]
    flop = found["counted"]["flop"]
    return [
        name(found), f"{(ready['parameters'] - ready['trainable']) / 1e6:.0f} M", f"{ready['trainable'] / 1e6:.1f} M",
        str(settings["pixels"]), f"{settings['images']} × {settings['steps']}", _seconds(found, "rollout"),
        _seconds(found, "update"), f"{settings['images'] / seconds(found, 'iteration'):.3g}",
        f"{flop['rollout'] / 1e12:.1f} + {flop['update'] / 1e12:.1f}",
        f"{share(found, 'rollout'):.0%}", f"{share(found, 'update'):.0%}", f"{ceiling(found) / 1e9:.0f} GFLOP/s",
    ]  # fmt: skip


def _seconds(found: Found, part: str) -> str:
    spent = f" ({seconds(found, part, 'cpu'):.1f})" if clock(found) == "cpu" else ""
    return f"{seconds(found, part):.1f} s{spent}"


def _memory(found: Found) -> list[str]:
    took = memory(found)
    gigabytes = {name: f"{size / 1e3:.2f}" for name, size in took.items()}
    return [
        name(found), gigabytes["estimate"], gigabytes["live"], f"{took['live'] / took['estimate']:.2f}",
        gigabytes["update"], f"{took['update'] / took['estimate']:.2f}", gigabytes["rollout"], gigabytes["loading"],
    ]  # fmt: skip


def _names(results: Sequence[Found]) -> list[str]:
    return list(dict.fromkeys(part for found in results for part in found["estimate_mb"]))


def _parts(found: Found, names: Sequence[str]) -> list[str]:
    sizes = found["estimate_mb"]
    return [name(found), *(f"{sizes[part] / 1e3:.2f}" if part in sizes else "" for part in names)]


def _conditions(found: Found) -> str:
    ready, machine, settings = found["ready"], found["machine"], found["ready"]["settings"]
    where = ready["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    parts = ", ".join(
        f"{part.replace('_', ' ')} {told['parameters'] / 1e6:.0f} M in {' and '.join(told['dtypes'])}"
        for part, told in sorted(ready["parts"].items())
    )
    loads = [answer["load_average"] for answer in found["timed"]]
    busy = "" if ready["accelerator"] else (
        f" The process had {seconds(found, 'iteration', 'cpu') / seconds(found, 'iteration'):.1f} processors in the"
        f" mean, of {machine['threads']} asked for; load average {min(loads):.1f} to"
        f" {max(loads):.1f}, its own included."
    )  # fmt: skip
    versions = ready["versions"]
    return (
        f"**{name(found)}** ({found['date']}): {where}, {machine['memory_gb']} GB of memory. Guidance"
        f" {settings['guidance_scale']:g}, of {settings['steps']} steps {ready['trained_steps']} trained on,"
        f" micro-batch {settings['micro_batch']}, rank {settings['rank']}; {len(found['timed'])} timed, after a warm-up"
        f" and one that was counted; matrices of {settings['matmul']}². Parameters: {parts}.{busy} torch"
        f" {versions['torch']}, diffusers {versions['diffusers']}, transformers {versions['transformers']}."
    )
