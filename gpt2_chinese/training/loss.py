"""The model as it is trained: windows in, their loss out, compiled where that pays."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from gpt2_chinese.compiled import make_trusted_folder, user_cache_folder
from gpt2_chinese.parallel import safe_folder, safe_path
from gpt2_chinese.training.attention import CAUSAL_ATTENTION, causal_attention
from gpt2_chinese.training.dropout import use_cpu_dropout

HEAD_ROWS = 512  # of logits at a time on a CPU


class HeadLoss(torch.autograd.Function):
    """The head and the cross-entropy in one, for the CPU, where reading and writing logits takes as long as products.

    The gradient is made in the forward pass, from some rows of logits at a time: softmax less the one-hot target, times
    the head, and times the hidden states. The logits as a whole, most of the memory of a large vocabulary, never exist.

    With teachers the gradient is that of `(1 - share) * (loss of the text) + share * (cross-entropy with the mean of
    the teachers' distributions)` (Hinton et al. 2015, at temperature 1); the value stays the loss of the text.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        share: float = 0.0,
        *taught: torch.Tensor,
    ) -> torch.Tensor:
        """Sum of the losses, in nats, of hidden states [N, n_embd] under a head [V, n_embd] for targets [N].

        The products are computed in the type of autocast where that is on, everything else in float32.

        Args:
            share: of the teachers in the gradient; 0 without teachers.
            taught: the hidden states [N, its n_embd] and the head [V, its n_embd] of each teacher, one after the other.
        """
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else head.dtype
        assert taught or not share
        weights = head.to(dtype)
        loss = torch.zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty(hidden.shape, dtype=torch.float32)
        head_gradient = torch.zeros(head.shape, dtype=torch.float32)
        minus_one = torch.full((HEAD_ROWS, 1), -1.0)
        with torch.autocast("cpu", enabled=False):
            for first in range(0, len(hidden), HEAD_ROWS):
                rows = hidden[first : first + HEAD_ROWS].to(dtype)
                target = targets[first : first + HEAD_ROWS, None]
                logits = rows @ weights.T
                probabilities = torch.softmax(logits, 1, dtype=torch.float32)
                # The greatest logit and its probability say what the sum of all was; that of a target may be 0.
                greatest = logits.amax(1, keepdim=True).float() - probabilities.amax(1, keepdim=True).log_()
                loss += (greatest - logits.gather(1, target)).sum()
                if taught:
                    probabilities -= _mean_distribution(taught, slice(first, first + HEAD_ROWS), dtype).mul_(share)
                gradient = probabilities.scatter_add_(1, target, minus_one[: len(rows)] * (1 - share)).to(dtype)
                hidden_gradient[first : first + HEAD_ROWS] = gradient @ weights
                if dtype == torch.float32:
                    head_gradient.addmm_(gradient.T, rows)
                else:
                    head_gradient += gradient.T @ rows
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.dtypes = hidden.dtype, head.dtype
        ctx.others = 2 + len(taught)
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden states and head; in place, so a second pass over the same loss is an error."""
        hidden_gradient, head_gradient = (gradient.mul_(outer[0]) for gradient in ctx.saved_tensors)
        hidden_type, head_type = ctx.dtypes
        return hidden_gradient.to(hidden_type), head_gradient.to(head_type), *[None] * ctx.others


def _mean_distribution(taught: Sequence[torch.Tensor], rows: slice, dtype: torch.dtype) -> torch.Tensor:
    """The mean of the teachers' distributions over the vocabulary, float32 [rows, V]."""
    distributions = [
        torch.softmax(hidden[rows].to(dtype) @ head.to(dtype).T, 1, dtype=torch.float32)
        for hidden, head in zip(taught[::2], taught[1::2], strict=True)
    ]
    return torch.stack(distributions).mean(0)


class WindowLoss(nn.Module):
    """A GPT-2 that answers windows with the sum of their tokens' losses, in nats.

    The sum, not the mean: over micro-batches and ranks of different sizes the sums add up to the exact mean.

    Args:
        rows: of the embedding, those that are tokens (see `pad_vocabulary`); None for all.
        recompute: compute activations and logits again in the backward pass instead of keeping them.
        teachers: models of the same vocabulary whose mean distribution is learnt too, on the device.
        teacher_share: of the teachers in the gradient, from 0 to 1 (see `HeadLoss`).
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        *,
        rows: int | None = None,
        recompute: bool = False,
        teachers: Sequence[GPT2LMHeadModel] = (),
        teacher_share: float = 0.0,
    ) -> None:
        super().__init__()
        # Registered without a mask function, so transformers passes no mask, compiled or not.
        AttentionInterface.register(CAUSAL_ATTENTION, causal_attention)
        model.set_attn_implementation(CAUSAL_ATTENTION)
        for module in list(model.modules()):
            if isinstance(getattr(module, "act", None), NewGELUActivation):
                # The same formula as one operation; without a compiler it is eight, a seventh of an update's time.
                module.act = nn.GELU(approximate="tanh")
        if model.device.type == "cpu":
            use_cpu_dropout(model)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model = model
        self._rows = rows or model.config.vocab_size
        self._recompute = recompute
        self._compiled: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._compiled_shape: tuple[int, ...] = ()
        self._teachers = tuple(teachers)  # in a tuple they are no parameters of this module
        self._teacher_share = teacher_share if teachers else 0.0
        for teacher in teachers:
            teacher.set_attn_implementation(CAUSAL_ATTENTION)

    def compile_for(self, shape: tuple[int, ...]) -> None:
        """Compile for windows of this shape; others, as the last ones of an epoch, are not worth another minute."""
        keep_compiled_code_private()
        whole = self._loss if self.model.device.type == "cuda" else self._hidden
        compiled = torch.compile(whole, dynamic=False)

        def first_call(input_ids: torch.Tensor) -> torch.Tensor:
            self._compiled = compiled
            with safe_path():  # compiles both passes
                return compiled(input_ids)

        self._compiled, self._compiled_shape = first_call, shape

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Take int64 [windows, n_ctx]; the first token of a window is not predicted, the last predicts nothing."""
        compiled = self._compiled if tuple(input_ids.shape) == self._compiled_shape else None
        if input_ids.is_cuda:
            return (compiled or self._loss)(input_ids)
        hidden = (compiled or self._hidden)(input_ids)[:, :-1]
        head = self.model.lm_head.weight[: self._rows]
        taught = self._taught(input_ids)
        return HeadLoss.apply(hidden.flatten(0, 1), head, input_ids[:, 1:].flatten(), self._teacher_share, *taught)

    @torch.no_grad()
    def _taught(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """The hidden states [windows * (n_ctx - 1), n_embd] and the head of each teacher."""
        taught = []
        for teacher in self._teachers:
            hidden = teacher.transformer(input_ids, use_cache=False).last_hidden_state
            taught += [hidden[:, :-1].flatten(0, 1), teacher.lm_head.weight[: self._rows]]
        return taught

    def _hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.transformer(input_ids, use_cache=False).last_hidden_state

    def _loss(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self._hidden(input_ids)
        if not self._recompute:
            return self._head_loss(hidden, input_ids)
        losses = [
            checkpoint(self._head_loss, hidden[row : row + 1], input_ids[row : row + 1], use_reentrant=False)
            for row in range(len(input_ids))
        ]
        return torch.stack(losses).sum()

    def _head_loss(self, hidden: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        # Sliced before the head: the logits are most of the memory.
        logits = self.model.lm_head(hidden[:, :-1])[..., : self._rows].float().flatten(0, 1)
        loss = F.cross_entropy(logits, input_ids[:, 1:].flatten(), reduction="sum")
        if not self._teachers:
            return loss
        taught = self._taught(input_ids)
        with torch.no_grad():
            distribution = _mean_distribution(taught, slice(None), taught[0].dtype)
        mixed = loss + self._teacher_share * (F.cross_entropy(logits, distribution, reduction="sum") - loss)
        return loss.detach() + mixed - mixed.detach()


def pad_vocabulary(model: GPT2LMHeadModel, multiple: int = 64) -> int:
    """Give the embedding, and an output layer of its own, rows that no token uses, so that there is a multiple of them
    that matrix products are fast at.

    Their logits are cut off before the loss, so they change no figure and stay 0. Gives the number of true rows.
    """
    rows = int(model.config.vocab_size)
    embedding, head = (F.pad(weight.detach(), (0, 0, 0, -rows % multiple)) for weight in _vocabulary_weights(model))
    _set_vocabulary_weights(model, nn.Parameter(embedding), None if is_tied(model) else nn.Parameter(head))
    return rows


@contextmanager
def unpadded(model: GPT2LMHeadModel, rows: int) -> Iterator[GPT2LMHeadModel]:
    """The model with its true rows only, to be saved; it shares its memory with the one that is trained."""
    tied = is_tied(model)
    embedding, head = _vocabulary_weights(model)
    cut, cut_head = (nn.Parameter(weight.detach()[:rows]) for weight in (embedding, head))
    _set_vocabulary_weights(model, cut, None if tied else cut_head)
    try:
        yield model
    finally:
        _set_vocabulary_weights(model, embedding, None if tied else head)


def is_tied(model: GPT2LMHeadModel) -> bool:
    """Whether the output layer is the embedding."""
    return model.lm_head.weight is model.transformer.wte.weight


def _vocabulary_weights(model: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return model.transformer.wte.weight, model.lm_head.weight


def _set_vocabulary_weights(model: GPT2LMHeadModel, embedding: nn.Parameter, head: nn.Parameter | None) -> None:
    """Set the embedding and the output layer; None ties it to the embedding."""
    model.transformer.wte.weight = embedding
    model.lm_head.weight = embedding if head is None else head


def should_compile(
    choice: str, *, run_flops: float, device: torch.device, ranks: int = 1, recompute: bool = False
) -> bool:
    """Whether to compile; auto is always on a GPU, and on a CPU for runs of more than twenty minutes or so.

    Args:
        choice: auto, on or off.
        run_flops: operations of the whole run; a core of a CPU does some 5e10 of them a second.
    """
    if choice != "auto":
        return choice == "on"
    if recompute:
        return False
    if device.type == "cuda":
        return True
    compilers = [os.environ.get("CXX", ""), "g++", "clang++"]
    has_compiler = any(name and shutil.which(name) for name in compilers)
    return has_compiler and ranks == 1 and run_flops / (torch.get_num_threads() * 5e10) > 1200


def keep_compiled_code_private() -> None:
    """Let torch.compile keep its code where nobody else can put another, unless the user says where.

    Its own choice is a folder of /tmp with a name that everybody can foresee and make first. Processes that this one
    starts use the same.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Importing torch._dynamo, as transformers does, sets the variable to torch's own choice.
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    if given and os.path.abspath(given) != os.path.abspath(default_cache_dir()):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.abspath(given)
        return
    try:
        folder = str(make_trusted_folder(user_cache_folder() / "inductor"))
    except OSError:
        folder = tempfile.mkdtemp(prefix="gpt2-chinese-")  # every run compiles
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def compiler_problem(device: torch.device) -> str:
    """Why torch.compile does not work here, found by compiling one line; empty where it does."""
    try:
        keep_compiled_code_private()
        # Once in a process, torch tries the processor's instructions with `python -c`, which would run a ctypes.py of
        # the folder one stands in. This is where it does; there is no other thread yet that a folder matters to.
        with safe_folder(), safe_path():
            line = torch.compile(lambda x: (x * x).sum(), dynamic=False)
            line(torch.ones(8, device=device, requires_grad=True)).backward()
    except (RuntimeError, OSError, ImportError) as error:
        return str(error).strip().splitlines()[0]
    return ""
