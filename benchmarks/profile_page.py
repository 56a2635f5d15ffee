"""The page about where time goes, from its recorded results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.ddpo_setup import SETUP
from benchmarks.markdown import grid, paragraph, where

NAMES = {"quickstart": "quickstart", "tiny": "tiny pipeline"}
DENOISER = ("denoiser, forward", "backward")
Results = Mapping[str, Any]


def page(results: Results) -> str:
    """The whole page."""
    return "\n\n".join(
        [
            "# Where an iteration spends its time",
            paragraph(
                f"Written by `python -m benchmarks.profile --rounds {results['rounds']}` on {results['date']}; every"
                " number is in [results/profile.json](results/profile.json)."
            ),
            _jobs(results["jobs"]),
            _parts(results["jobs"]),
            _ways(results["jobs"]),
            _compiled(results.get("compile")),
            _blocks(results.get("blocks")),
            _overlap(results["overlap"]),
            _attention(results["jobs"], results["text"]),
            _conditions(results),
        ]
    ) + "\n"  # fmt: skip


def _jobs(jobs: Results) -> str:
    told = []
    for name, job in jobs.items():
        guidance = f"guidance {job['guidance']:g}" if job["guidance"] != 1 else "no guidance"
        told.append(
            f"**{NAMES[name]}**: {job['samples']} images in {job['steps']} steps with {guidance}, then {job['updates']}"
            f" update{'s' if job['updates'] > 1 else ''} from all of them; U-Net of"
            f" {job['ready']['parameters'] / 1e6:.2f} M parameters, {job['ready']['trainable'] / 1e3:.0f} k of them"
            " in a LoRA"
        )
    return paragraph(
        f"One iteration of DDPO, of two models. {'; '.join(told)}. The first is the recipe `quickstart` as it is, the"
        " second is what [trl_ddpo.md](trl_ddpo.md) compares with TRL."
    )


def _parts(jobs: Results) -> str:
    names = list(dict.fromkeys(name for job in jobs.values() for name in job["parts"]))
    totals = {job: sum(found["parts"].values()) for job, found in jobs.items()}
    rows = []
    for name in names:
        phase, _, part = name.partition(": ")
        cells = [_share(found["parts"].get(name), totals[job]) for job, found in jobs.items()]
        rows.append([f"{phase}: {part}" if part != phase else phase, *cells])
    rows.append(["**all**", *(f"{total:.2f} s" for total in totals.values())])
    outside = {
        job: 1 - sum(s for n, s in found["parts"].items() if n.partition(": ")[2] in DENOISER) / totals[job]
        for job, found in jobs.items()
    }
    said = " and ".join(f"{share:.1%} ({NAMES[job]})" for job, share in outside.items())
    return "\n\n".join(
        [
            "## Where the time goes",
            grid(["", *(NAMES[job] for job in jobs)], rows),
            paragraph(
                "Median processor seconds of a part, without those of the parts inside it, and their share of the"
                " iteration. *Backward* is all of the backward pass; what lies behind the denoiser there is the loss"
                f" and a few sums. **Outside of the denoiser and its backward pass: {said}.** So no reordering of"
                " what is around it can make an iteration much shorter on this machine: what is left is to call the"
                " denoiser less often, or to make a call cheaper."
            ),
        ]
    )


def _share(seconds: float | None, total: float) -> str:
    return "–" if seconds is None else f"{seconds:.3f} s ({seconds / total:.1%})"


def _ways(jobs: Results) -> str:
    rows = []
    for name, job in jobs.items():
        ways = job["ways"]
        beside = ways["seconds"]["beside"]
        for way in ("merged", "channels-last"):
            extra = ways["merging"] if way == "merged" else 0.0
            seconds = [value + extra for value in ways["seconds"][way]]
            rows.append(
                [
                    f"{NAMES[name]}: {way}",
                    f"{median(beside):.3f} s",
                    f"{median(seconds):.3f} s",
                    _ratio(beside, seconds),
                    str(ways["grey_levels"][way]),
                ]
            )
    return "\n\n".join(
        [
            "## A cheaper call",
            grid(["a rollout", "as it is", "so", "as it is / so", "grey levels apart"], rows),
            paragraph(
                f"Medians of processor seconds for {next(iter(jobs.values()))['ways']['images']} images, in turn, and"
                " the ratio round by round (lowest–highest); above 1, the new way is faster. *Grey levels apart* is the"
                " largest difference of any pixel, of 255."
            ),
            paragraph(
                "**Merged**: each layer's adapter is added into its weight for the time of the rollout (merging and"
                " putting back is in the seconds). The weights that come back are the very ones that were there. It is"
                " done wherever a step is not replayed: evaluation, `generate`, best of n by `sft`, online pairs, and"
                " training by `elbo-*`, `nft` and `reward-weighted`. Not by `ppo-clip` and `reinforce`, whose ratio"
                " must be exactly 1 before the first update, nor by reward backpropagation."
            ),
            paragraph(
                "**Channels-last** is how convolutions like their input on some devices. It is not used: no gain here,"
                " and where a GPU would gain by it was not measured."
            ),
        ]
    )


def _compiled(found: Results | None) -> str:
    title = "## torch.compile, the denoiser as a whole"
    if found is None:
        return f"{title}\n\nNot measured in this run."
    seconds = found["seconds"]
    rows = [
        [part, *(f"{median(seconds[way][part]):.3f} s" for way in seconds),
         f"{median(seconds['as it is'][part]) / median(seconds['compiled'][part]):.2f}"]
        for part in ("rollout", "update")
    ]  # fmt: skip
    return "\n\n".join(
        [
            title,
            grid(["", "as it is", "compiled", "as it is / compiled"], rows),
            paragraph(
                f"By `python -m benchmarks.profile --compile whole`: the quickstart's model, {found['images']} images"
                f" in a rollout, and {found['images']} steps forward and backward as in an update; the"
                " denoiser is compiled as a whole. Medians of processor seconds, the one way after the other, so read"
                f" them roughly. The first rollout and update together took {found['first']['compiled']:.0f} s of wall"
                f" time, in place of {found['first']['as it is']:.0f} s. A replay with gradient was"
                f" {found['replay_apart']:g} away from the rollout's log-probabilities."
            ),
            paragraph(
                "This is no option of the trainer, for want of patience: adapters on, off or merged, with gradient or"
                " without, and each size of a batch are versions of their own, each of which is compiled by itself."
            ),
        ]
    )


def _blocks(found: Results | None) -> str:
    title = "## torch.compile, block by block"
    if not found:
        return f"{title}\n\nNot measured in this run."
    rows, told = [], []
    for name, job in found.items():
        plain, compiled = (job["seconds"][way] for way in ("as it is", "compiled"))
        warm = job["first"]
        for part in plain:
            rows.append(
                [
                    f"{NAMES[name]}: {part}",
                    f"{median(plain[part]):.3f} s",
                    f"{median(compiled[part]):.3f} s",
                    _ratio(plain[part], compiled[part]),
                ]
            )
        made = ", ".join(f"{count} x {kind}" for kind, count in job["blocks"].items())
        told.append(
            f"{NAMES[name]} ({made}; {job['images']} images; {job['versions']} versions): {warm['compiled']:.0f} s, in"
            f" place of {warm['as it is']:.0f} s, and {warm['compiled, from disk']:.0f} s once torch's cache on the"
            f" disk has them; the replay was {job['replay_apart']['compiled']:g} away, as it is"
            f" {job['replay_apart']['as it is']:g}"
        )
    some = next(iter(found.values()))
    return "\n\n".join(
        [
            title,
            grid(["", "as it is", "compiled", "as it is / compiled"], rows),
            paragraph(
                "What `compile: true` does, by `python -m benchmarks.profile --compile blocks --rounds"
                f" {len(some['seconds']['compiled']['rollout'])}` on {some['date']}: a rollout, and as many steps"
                " forward and backward as in an update, in turn with the same policy as it is. Processor seconds, and"
                " the ratio round by round (lowest–highest). **Not run on a GPU.**"
            ),
            paragraph(
                "The first rollout and update together, in processor seconds, the C++ compiler's among them, and how"
                f" far the log-probabilities of a replay with gradient were from the rollout's: {'; '.join(told)}. A"
                " run has more versions: of each size of a batch, with adapters off, and merged."
            ),
        ]
    )


def _ratio(first: Sequence[float], second: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def _overlap(found: Results) -> str:
    seconds = found["seconds"]
    batches = SETUP.images // found["batch_size"]
    rows = [[name, f"{median(values):.2f} s"] for name, values in seconds.items()]
    if not found["equal"]:
        raise ValueError("the scores of the two ways differ: there is nothing to compare")
    return "\n\n".join(
        [
            "## A reward that somebody else computes",
            grid(["asked", "sampling and scoring"], rows),
            paragraph(
                f"Medians of wall seconds for {SETUP.images} images of the tiny pipeline in {batches} batches, with a"
                f" reward that waits {found['pause']:.3f} s for each image: about as long as sampling it takes, and no"
                " processor. *Beside*, it is asked about each batch in a thread while the next one is sampled, as"
                " rewards over HTTP are. Afterwards / beside, round by round:"
                f" **{_ratio(seconds['afterwards'], seconds['beside'])}**; the most that is possible is"
                f" {2 * batches / (batches + 1):.2f}. The scores are equal to the bit."
            ),
        ]
    )


def _attention(jobs: Results, text: Results) -> str:
    told = "; ".join(
        f"{NAMES[name]}: {job['attention']['scaled_dot_product_attention']} calls of torch's fused attention,"
        f" {job['attention']['_softmax']} of a softmax by itself"
        for name, job in jobs.items()
    )
    return "\n\n".join(
        [
            "## Attention",
            paragraph(f"A rollout of one image, counted by torch's profiler. {told}. It is fused already."),
            paragraph(
                "Keys and values of the text are the same at every step. Keeping them would save"
                f" {text['512']:.2%} of the operations of a step of Stable Diffusion 1.5 at 512 pixels, and"
                f" {text['256']:.1%} at 256 (counted, not timed): they are made anew."
            ),
        ]
    )


def _conditions(results: Results) -> str:
    machine = results["machine"]
    versions = next(iter(results["jobs"].values()))["ready"]["versions"]
    return "\n\n".join(
        [
            "## Conditions",
            paragraph(where(machine, versions)),
            paragraph(
                f"Load average at the start: {machine['load_average'][0]:g}. Processor seconds leave out the time in"
                " which others had the processor, though not the caches that others emptied: read the shares and"
                " ratios, not the seconds."
            ),
        ]
    )
