"""A denoiser too large for one device: its frozen weights are divided among the processes of a run, by torch's FSDP2.

The weights that are trained, a LoRA's, are few: every process has them whole, so all that the engine does with them is
as ever. A block's frozen weights come together on a device when it is used, and part again after it.

Each pass through the denoiser then takes all processes (see ``diffalign.lockstep``). The backward pass makes the
forward pass again, right before it, and is one piece of work with it: a pass that others stand in for has to be the
same for all, whatever graph it belongs to.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from diffalign import processes
from diffalign.errors import ConfigError
from pipelines.families import Conditioning

Question = tuple[Tensor, Tensor, Conditioning]
"""What a denoiser is asked: latents ``(B, C, H, W)``, timesteps ``(B,)`` and the conditioning."""


class Divided:
    """A denoiser whose frozen weights are divided among the processes."""

    def __init__(
        self, denoiser: nn.Module, ask: Callable[[Tensor, Tensor, Conditioning], Tensor], some: Callable[[], Question],
        device: torch.device,
    ) -> None:  # fmt: skip
        """``ask`` is a pass through the denoiser, and ``some`` a question for it, of one image, that needs no other
        process. All processes must make it at the same place. Raises ConfigError where there is only one.
        """
        crew = processes.start()
        if crew.count == 1:
            raise ConfigError(
                "trainer.shard divides the frozen weights among the processes of a run, and there is one: start several"
                " with 'accelerate launch' or torchrun, or leave it out"
            )
        self.ask, self.some = ask, some
        self.trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        crew.exchange("shard")
        self.parting = True
        for module in divide(denoiser, set(self.trained), device, crew.count):
            module.register_forward_hook(self._part)
        for parameter in self.trained:
            parameter.data = parameter.data.to(device)
        crew.exchange("divided")  # from here on an exchange begins in lockstep, for all of them or for none
        self.lockstep = crew.lockstep
        self.forward = self.lockstep.add(self._forward_for_others, self._backward_for_others)
        self.backward = self.forward + 1

    def __call__(self, latents: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        """The denoiser's output ``(B, C, H, W)``."""
        if torch.is_grad_enabled() and not latents.requires_grad:
            latents = latents.detach().requires_grad_()  # else nothing here would have a gradient
        output: Tensor = _Pass.apply(latents, self, timesteps, text)
        return output

    def _part(self, module: nn.Module, given: object, output: object) -> None:
        """After a block's forward pass. Inside a backward pass FSDP takes it for one that a checkpoint makes again, and
        leaves the weights together for the block's own backward pass; but here all other blocks come first.
        """
        if self.parting:
            assert isinstance(module, FSDPModule)
            module.reshard()

    def again(self, question: Question, gradient: Tensor) -> Tensor | None:
        """Forward and backward; adds to the gradients of what is trained, and returns that of the latents.

        The latents always have one: which blocks the backward pass comes through must not depend on who asks.
        """
        latents, timesteps, text = question
        given = latents.detach().requires_grad_()
        with torch.enable_grad():
            output = self.ask(given, timesteps, text)
            self.parting = False
            torch.autograd.backward(output, gradient)
            self.parting = True
        return given.grad

    def _forward_for_others(self) -> None:
        with torch.no_grad():
            self.ask(*self.some())

    def _backward_for_others(self) -> None:
        own = [parameter.grad for parameter in self.trained]
        for parameter in self.trained:
            parameter.grad = None  # what comes here is thrown away, and must not be added to what is there
        with torch.enable_grad():
            question = self.some()
            start, none = question[0].new_zeros((), requires_grad=True), torch.zeros_like(question[0])
            _Inside.apply(start, lambda: self.again(question, none)).backward()
        for parameter, gradient in zip(self.trained, own, strict=True):
            parameter.grad = gradient


class _Pass(torch.autograd.Function):
    """A pass through a divided denoiser, which keeps nothing but its input."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, divided: Divided, timesteps: Tensor, text: Conditioning) -> Tensor:
        ctx.save_for_backward(latents)
        ctx.asked = divided, timesteps, text
        return divided.lockstep.work(divided.forward, lambda: divided.ask(latents, timesteps, text))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:
        (latents,) = ctx.saved_tensors
        divided, timesteps, text = ctx.asked
        found = divided.lockstep.work(divided.backward, lambda: divided.again((latents, timesteps, text), gradient))
        return found, None, None, None


class _Inside(torch.autograd.Function):
    """Does something inside a backward pass, where FSDP goes about it otherwise, with its gathers in another order."""

    @staticmethod
    def forward(ctx: Any, anything: Tensor, work: Callable[[], object]) -> Tensor:
        ctx.work = work
        return anything.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.work()
        return gradient, None


def divide(denoiser: nn.Module, whole: set[nn.Parameter], device: torch.device, count: int) -> Sequence[nn.Module]:
    """Leaves each of ``count`` processes its part of every parameter on the device, but for those that stay ``whole``.

    What comes together and parts again is a block: what diffusers names as not to be split (``_no_split_modules``), and
    at last all that is in none of them; these are returned. Raises ConfigError for a denoiser that names none.
    """
    named = set(getattr(denoiser, "_no_split_modules", None) or ())
    # A block may contain blocks, and those come first.
    blocks = [module for module in reversed(list(denoiser.modules())) if type(module).__name__ in named]
    if not blocks:
        raise ConfigError(f"trainer.shard: {type(denoiser).__name__} does not say which blocks it is made of")
    # Blocks that return views warn of operations in place on them, of which diffusers has none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
    mesh = init_device_mesh(device.type, (count,))
    for module in (modules := [*blocks, denoiser]):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    return modules
