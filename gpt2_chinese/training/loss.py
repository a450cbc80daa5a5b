"""The model as it is trained: windows in, their loss out, compiled where that pays."""

from __future__ import annotations

import atexit
import hashlib
import inspect
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, GPT2LMHeadModel
from transformers.activations import NewGELUActivation

from gpt2_chinese.compiled import make_trusted_folder, user_cache_folder
from gpt2_chinese.parallel import safe_folder, safe_path
from gpt2_chinese.training import attention, dropout
from gpt2_chinese.training.attention import CAUSAL_ATTENTION, causal_attention
from gpt2_chinese.training.blocks import blocks_output, can_be_written_out, matrix_type
from gpt2_chinese.training.dropout import use_cpu_dropout
from gpt2_chinese.training.fused import DTYPES, SUM_ROWS, add_softmax, cross_entropy_in_place
from gpt2_chinese.training.ngram_teacher import NgramTeacher, Predictions

HEAD_ROWS = 512  # of logits at a time on a CPU, at most
_LOGITS_BYTES = 32 << 20  # of them, unless `SUM_ROWS` of them have more
CACHE_SHARE = 0.2  # of the n-gram's cache in what is learnt from the n-gram and teachers, at most
MOST_OF_NGRAM = 0.5  # that its cache can be
_HEAD_COLUMNS = 8192  # of the vocabulary, whose gradient is added up at a time


class HeadLoss(torch.autograd.Function):
    """The head and the cross-entropy in one, for the CPU, where reading and writing logits takes as long as products.

    The gradient is made in the forward pass, from some rows of logits at a time: softmax less the one-hot target, times
    the head, and times the hidden states. The logits as a whole, most of the memory of a large vocabulary, never exist.

    With teachers the gradient is that of `(1 - share) * (loss of the text) + share * (cross-entropy with the teachers'
    distribution)` (Hinton et al. 2015, at temperature 1); the value stays the loss of the text. That distribution is
    the mean of several models', computed here or before, or an n-gram's, or a mean of these two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: torch.Tensor,
        targets: torch.Tensor,
        share: float = 0.0,
        of_head: list[torch.Tensor] | None = None,
        ngram: NgramTarget | None = None,
        soft: SoftTarget | None = None,
        *taught: torch.Tensor,
    ) -> torch.Tensor:
        """Sum of the losses, in nats, of hidden states [N, n_embd] under a head [V, n_embd] for targets [N].

        The products are computed in the type of autocast where that is on, everything else in float32.

        Args:
            share: of the teachers in the gradient; 0 without teachers.
            of_head: gets the head's gradient in the backward pass, instead of the head: for `TiedLookup`.
            ngram: what an n-gram predicts in the N rows, and its part of `share`.
            soft: what teachers predict in the N rows, where that has been computed before.
            taught: otherwise the hidden states [N, its n_embd] and the head [V, its n_embd] of each teacher, one after
                the other.
        """
        dtype = matrix_type() if torch.is_autocast_enabled("cpu") else head.dtype
        is_taught = bool(taught) or ngram is not None or soft is not None
        assert is_taught or not share
        weights = head.to(dtype)
        loss = torch.zeros((), dtype=torch.float32)
        hidden_gradient = torch.empty(hidden.shape, dtype=dtype)
        head_gradient = torch.zeros(head.shape, dtype=torch.float32)
        fitting = _LOGITS_BYTES // (len(head) * dtype.itemsize) // SUM_ROWS * SUM_ROWS
        rows_at_once = min(HEAD_ROWS, max(SUM_ROWS, fitting))
        with torch.autocast("cpu", enabled=False):
            for first in range(0, len(hidden), rows_at_once):
                part = slice(first, first + rows_at_once)
                rows = hidden[part].to(dtype)
                logits = _logits(rows, weights)
                distributions = _mean_distribution(taught, ngram, soft, part, dtype) if is_taught else None
                loss += cross_entropy_in_place(logits, targets[part], distributions, share).sum()
                gradient = logits.to(dtype)
                hidden_gradient[part] = gradient @ weights
                if dtype == torch.float32:
                    head_gradient.addmm_(gradient.T, rows)
                    continue
                for begin in range(0, len(head), _HEAD_COLUMNS):
                    columns = slice(begin, begin + _HEAD_COLUMNS)
                    head_gradient[columns] += gradient[:, columns].T @ rows
        ctx.save_for_backward(hidden_gradient, head_gradient)
        ctx.dtypes = hidden.dtype, head.dtype
        ctx.of_head, ctx.others = of_head, 5 + len(taught)
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of hidden states and head; in place, so a second pass over the same loss is an error."""
        hidden_gradient, head_gradient = (gradient.mul_(outer[0]) for gradient in ctx.saved_tensors)
        hidden_type, head_type = ctx.dtypes
        to_head: torch.Tensor | None = head_gradient.to(head_type)
        if ctx.of_head is not None:
            ctx.of_head.append(to_head)
            to_head = None
        return hidden_gradient.to(hidden_type), to_head, *[None] * ctx.others


class TiedLookup(torch.autograd.Function):
    """Rows of an embedding that is the head too: their gradient is added to the head's, in its place.

    Autograd would make a second gradient of that size, and a third to add them up. The head's is there by then, since
    that of the rows comes from it.
    """

    @staticmethod
    def forward(
        ctx: Any, embedding: torch.Tensor, input_ids: torch.Tensor, of_head: list[torch.Tensor]
    ) -> torch.Tensor:
        """Take an embedding [V, n_embd], int64 [windows, n_ctx], and the list that `HeadLoss` has too."""
        ctx.save_for_backward(input_ids)
        ctx.of_head = of_head
        return F.embedding(input_ids, embedding)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (input_ids,), gradient = ctx.saved_tensors, ctx.of_head.pop()
        rows = outer[0].flatten(0, -2).to(gradient.dtype)
        gradient.add_(torch.sparse_coo_tensor(input_ids.flatten()[None], rows, gradient.shape, check_invariants=False))
        return gradient, None, None


def _logits(rows: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """[N, V], in a type that the compiled operations know."""
    logits = rows @ head.T
    return logits if logits.dtype in DTYPES else logits.float()


class NgramTarget(NamedTuple):
    """What an n-gram predicts, and its share of what is learnt from teachers; the rest of that is the models'."""

    predictions: Predictions
    share: float


class SoftTarget(NamedTuple):
    """What teachers predict in N rows: the rows `places`, int64 [N], of the whole text's `soft_targets`."""

    of_text: torch.Tensor
    places: torch.Tensor


def _mean_distribution(
    taught: Sequence[torch.Tensor],
    ngram: NgramTarget | None,
    soft: SoftTarget | None,
    rows: slice,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The teachers' distribution over the vocabulary, [rows, V] of the type of `_logits`."""
    pairs = list(zip(taught[::2], taught[1::2], strict=True))
    mean: torch.Tensor | None = None
    of_models = 1.0
    dtype_of_logits = dtype if dtype in DTYPES else torch.float32
    if ngram is not None:
        mean = ngram.predictions.dense(rows, ngram.share, dtype_of_logits)
        of_models -= ngram.share
    if soft is not None:
        predicted = soft.of_text[soft.places[rows]]
        return predicted.to(dtype_of_logits) if mean is None else mean.add_(predicted, alpha=of_models)
    for hidden, head in pairs:
        logits = _logits(hidden[rows].to(dtype), head.to(dtype))
        mean = torch.zeros_like(logits) if mean is None else mean
        add_softmax(logits, mean, of_models / len(pairs))
    assert mean is not None
    return mean


class WindowLoss(nn.Module):
    """A GPT-2 that answers windows with the sum of their tokens' losses, in nats.

    The sum, not the mean: over micro-batches and ranks of different sizes the sums add up to the exact mean.

    Args:
        rows: of the embedding, those that are tokens (see `pad_vocabulary`); None for all.
        recompute: compute activations and logits again in the backward pass instead of keeping them.
        teachers: models of the same vocabulary whose mean distribution is learnt too, on the device.
        soft_targets: instead of `teachers`, what they predict after each token of the text (see teachers.py).
        teacher_share: of the teachers in the gradient, from 0 to 1 (see `HeadLoss`).
        ngram: that is learnt from too, on the device.
        ngram_share: of the n-gram in the gradient; with `teacher_share` 1 at most.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        *,
        rows: int | None = None,
        recompute: bool = False,
        teachers: Sequence[GPT2LMHeadModel] = (),
        soft_targets: torch.Tensor | None = None,
        teacher_share: float = 0.0,
        ngram: NgramTeacher | None = None,
        ngram_share: float = 0.0,
    ) -> None:
        super().__init__()
        use_causal_attention(model, *teachers)
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
        self._compiled: Callable[..., torch.Tensor] | None = None
        self._compiled_shape: tuple[int, ...] = ()
        self._teachers = tuple(teachers)  # in a tuple they are no parameters of this module
        self._soft_targets = soft_targets  # no buffer of this module either
        self._teacher_share = teacher_share if teachers or soft_targets is not None else 0.0
        self._ngram = ngram if ngram_share else None
        self._ngram_share = ngram_share if ngram else 0.0
        assert self._teacher_share + self._ngram_share <= 1
        assert not teachers or soft_targets is None

    def compile_for(self, shape: tuple[int, ...]) -> None:
        """Compile for windows of this shape; others, as the last ones of an epoch, are not worth another minute."""
        keep_compiled_code_private()
        whole = self._loss if self.model.device.type == "cuda" else self._hidden
        compiled = torch.compile(whole, dynamic=False)

        def first_call(*given: torch.Tensor | None) -> torch.Tensor:
            self._compiled = compiled
            with safe_path():  # compiles both passes
                return compiled(*given)

        self._compiled, self._compiled_shape = first_call, shape

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Take int64 [windows, n_ctx]; the first token of a window is not predicted, the last predicts nothing.

        Args:
            position_ids: of the same shape; where they begin anew, tokens do not attend to those before. None counts
                from the window's begin.
            starts: where the windows begin in the text, int64 [windows]; wanted where `soft_targets` were given.
        """
        compiled = self._compiled if tuple(input_ids.shape) == self._compiled_shape else None
        if input_ids.is_cuda:
            return (compiled or self._loss)(input_ids, position_ids, starts)
        head: torch.Tensor
        embedding, head = _vocabulary_weights(self.model)
        of_head: list[torch.Tensor] | None = None
        if embedding is head and len(head) == self._rows:
            embedded = TiedLookup.apply(embedding, input_ids, of_head := [])
        else:
            embedded, head = F.embedding(input_ids, embedding), head[: self._rows]
        if compiled:
            hidden = compiled(input_ids, position_ids, embedded)
        elif can_be_written_out(self.model):
            hidden = written_out_states(self.model, position_ids, embedded, recompute=self._recompute)
        else:
            hidden = self._hidden(input_ids, position_ids, embedded)
        hidden = hidden[:, :-1]
        taught = states_of_teachers(self._teachers, self._rows, input_ids, position_ids)
        targets = input_ids[:, 1:].flatten()
        share, ngram = self._teacher_share + self._ngram_share, self._ngram_target(input_ids)
        soft = self._soft_target(input_ids, starts)
        return HeadLoss.apply(hidden.flatten(0, 1), head, targets, share, of_head, ngram, soft, *taught)

    def _soft_target(self, input_ids: torch.Tensor, starts: torch.Tensor | None) -> SoftTarget | None:
        if self._soft_targets is None:
            return None
        assert starts is not None
        places = starts[:, None] + torch.arange(input_ids.shape[1] - 1, device=starts.device)
        return SoftTarget(self._soft_targets, places.flatten())

    def _ngram_target(self, input_ids: torch.Tensor) -> NgramTarget | None:
        if self._ngram is None:
            return None
        part = self._ngram_share / (self._ngram_share + self._teacher_share)
        # A share of all that is taught, for a plan's teachers have not learnt from a cache.
        cache_share = min(MOST_OF_NGRAM, CACHE_SHARE / part)
        return NgramTarget(self._ngram.predictions(input_ids, cache_share), part)

    def _hidden(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None, embedded: torch.Tensor
    ) -> torch.Tensor:
        return hidden_states(self.model, input_ids, position_ids, embedded)

    def _loss(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        starts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = hidden_states(self.model, input_ids, position_ids)
        if not self._recompute:
            return self._head_loss(hidden, input_ids, position_ids, starts)
        others = ([None] * len(input_ids) if given is None else given.split(1) for given in (position_ids, starts))
        losses = [
            checkpoint(self._head_loss, *row, use_reentrant=False)
            for row in zip(hidden.split(1), input_ids.split(1), *others, strict=True)
        ]
        return torch.stack(losses).sum()

    def _head_loss(
        self,
        hidden: torch.Tensor,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor | None,
        starts: torch.Tensor | None,
    ) -> torch.Tensor:
        # Sliced before the head: the logits are most of the memory.
        logits = self.model.lm_head(hidden[:, :-1])[..., : self._rows].float().flatten(0, 1)
        loss = F.cross_entropy(logits, input_ids[:, 1:].flatten(), reduction="sum")
        mixed = loss
        with torch.no_grad():
            taught = states_of_teachers(self._teachers, self._rows, input_ids, position_ids)
            distributions = [
                torch.softmax(states @ head.to(states.dtype).T, 1, dtype=torch.float32)
                for states, head in zip(taught[::2], taught[1::2], strict=True)
            ]
            mean = torch.stack(distributions).mean(0) if distributions else None
            if (soft := self._soft_target(input_ids, starts)) is not None:
                mean = soft.of_text[soft.places].float()
            ngram = self._ngram_target(input_ids)
        if mean is not None:
            mixed = mixed + self._teacher_share * (F.cross_entropy(logits, mean, reduction="sum") - loss)
        if ngram is not None:
            expected = ngram.predictions.dense(slice(None), 1.0, torch.float32)
            mixed = mixed + self._ngram_share * (F.cross_entropy(logits, expected, reduction="sum") - loss)
        return loss if mixed is loss else loss.detach() + mixed - mixed.detach()


def use_causal_attention(*models: GPT2LMHeadModel) -> None:
    """Let models attend as in training."""
    # Registered without a mask function, so transformers passes no mask, compiled or not.
    AttentionInterface.register(CAUSAL_ATTENTION, causal_attention)
    for model in models:
        model.set_attn_implementation(CAUSAL_ATTENTION)


@torch.no_grad()
def states_of_teachers(
    teachers: Sequence[GPT2LMHeadModel], rows: int, input_ids: torch.Tensor, position_ids: torch.Tensor | None
) -> list[torch.Tensor]:
    """The hidden states [windows * (n_ctx - 1), n_embd] and the first rows of the head of each teacher.

    Args:
        teachers: after `use_causal_attention`.
        position_ids: as for `WindowLoss`.
    """
    taught = []
    for teacher in teachers:
        if can_be_written_out(teacher):
            embedded = F.embedding(input_ids, teacher.transformer.wte.weight)
            hidden = written_out_states(teacher, position_ids, embedded)
        else:
            hidden = hidden_states(teacher, input_ids, position_ids)
        taught += [hidden[:, :-1].flatten(0, 1), teacher.lm_head.weight[:rows]]
    return taught


def hidden_states(
    model: GPT2LMHeadModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    embedded: torch.Tensor | None = None,
) -> torch.Tensor:
    """The last hidden states [windows, n_ctx, n_embd].

    Args:
        position_ids: as for `WindowLoss`.
        embedded: the rows of the embedding for `input_ids`, where they have been looked up.
    """
    others: dict[str, torch.Tensor] = {"input_ids": input_ids} if embedded is None else {"inputs_embeds": embedded}
    if position_ids is not None:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        others |= {"position_ids": position_ids, "first_keys": places - position_ids}
    hidden: torch.Tensor = model.transformer(use_cache=False, **others).last_hidden_state
    return hidden


def written_out_states(
    model: GPT2LMHeadModel, position_ids: torch.Tensor | None, embedded: torch.Tensor, *, recompute: bool = False
) -> torch.Tensor:
    """As `hidden_states` for a model that `can_be_written_out`, in the type of autocast.

    Args:
        recompute: as for `WindowLoss`.
    """
    transformer = model.transformer
    places = torch.arange(embedded.shape[1])
    first_keys = None if position_ids is None else places - position_ids
    positions = transformer.wpe(places if position_ids is None else position_ids)
    return blocks_output(model, transformer.drop(embedded + positions), first_keys, recompute=recompute)


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


@contextmanager
def with_scaled_logits(model: GPT2LMHeadModel, scale: float) -> Iterator[GPT2LMHeadModel]:
    """The model with its logits times a scale, to be saved: temperature scaling (Guo et al. 2017).

    The head has no bias, so the last layer norm's weight and bias times the scale give that, and any GPT-2 has them.
    """
    norm = model.transformer.ln_f
    before = norm.weight, norm.bias
    if scale != 1.0:
        norm.weight, norm.bias = (nn.Parameter(parameter.detach() * scale) for parameter in before)
    try:
        yield model
    finally:
        norm.weight, norm.bias = before


def is_tied(model: GPT2LMHeadModel) -> bool:
    """Whether the output layer is the embedding."""
    return model.lm_head.weight is model.transformer.wte.weight


def _vocabulary_weights(model: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return model.transformer.wte.weight, model.lm_head.weight


def _set_vocabulary_weights(model: GPT2LMHeadModel, embedding: nn.Parameter, head: nn.Parameter | None) -> None:
    """Set the embedding and the output layer; None ties it to the embedding."""
    model.transformer.wte.weight = embedding
    model.lm_head.weight = embedding if head is None else head


def should_compile(choice: str, device: torch.device, *, recompute: bool = False) -> bool:
    """Whether to compile; auto is on a GPU only, since on a CPU a minute of compiling gains nothing over blocks.py.

    Args:
        choice: auto, on or off.
    """
    if choice != "auto":
        return choice == "on"
    return device.type == "cuda" and not recompute


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
        folder = str(make_trusted_folder(user_cache_folder() / f"inductor-{_operations_digest()}"))
    except OSError:
        folder = tempfile.mkdtemp(prefix="gpt2-chinese-")  # every run compiles
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def _operations_digest() -> str:
    """Of our operations, which compiled code calls by their names, whatever arguments they take in this version."""
    sources = "\n".join(inspect.getsource(module) for module in (attention, dropout))
    return hashlib.sha256(sources.encode()).hexdigest()[:16]


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
