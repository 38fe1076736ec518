"""The three losses of distillation, each without a [tokens, vocabulary] tensor.

The head is frozen in distillation, so the gradient with respect to the hidden states is all a
backward pass needs. It is computed chunk by chunk in the forward pass, where the logits exist
anyway, and the logits are dropped. `Head.logits` is the plain way, for tests and benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from morph.errors import UnsupportedModel


@dataclass(frozen=True, kw_only=True)
class Head:
    """The output head: logits = cap(scale * (hidden @ weight.T + bias)), in float32.

    weight `[V, D]`, bias `[V]` or None; `softcap` c means c * tanh(logits / c).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """Return the head of a transformers causal LM, its scale and soft cap from the config.

        Raises UnsupportedModel where the model has no linear head.
        """
        linear, config = model.get_output_embeddings(), model.config
        if not isinstance(linear, nn.Linear):
            raise UnsupportedModel(
                f"{type(model).__name__} has no linear output head; distillation needs one."
            )
        scale = 1.0 / (getattr(config, "logits_scaling", None) or 1.0)  # granite divides
        scale *= getattr(config, "logit_scale", None) or 1.0  # cohere multiplies
        softcap = getattr(config, "final_logit_softcapping", None)
        return cls(weight=linear.weight, bias=linear.bias, scale=scale, softcap=softcap)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits `[..., V]` of hidden states `[..., D]`, all at once."""
        raw = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        z = raw.to(_work_dtype(raw.dtype)) * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


def check_head(model: Any, hidden: torch.Tensor, logits: torch.Tensor) -> Head:
    """Return the model's Head after comparing it with logits the model itself computed.

    hidden `[..., D]` are the final hidden states, `logits` `[..., V]` the model's. Raises
    UnsupportedModel where the model does something to its logits that `Head` does not know.
    """
    head = Head.of(model)
    ours = head.logits(hidden)
    loose = 1e-2 if head.weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    error = (ours - logits.to(ours.dtype)).abs().max().item()
    size = logits.abs().max().item()
    if not error <= loose * max(size, 1e-6):
        raise UnsupportedModel(
            f"{type(model).__name__} changes its logits in a way morph does not know (they differ "
            f"by {error:.3g} at a size of {size:.3g}); the stages 'logits' and 'long' cannot run. "
            "The stage 'align' can."
        )
    return head


def relative_mse(
    output: torch.Tensor, target: torch.Tensor, squares: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the sum of squared differences over the sum of squared targets: a float32 scalar.

    0 for a copy, 1 for an output of zeros. Both `[B, T, D]`. `squares` replaces the sum of squared
    targets, where other processes hold more of them.
    """
    dtype = _work_dtype(output.dtype)
    if squares is None:
        squares = target.to(dtype).square().sum()
    return (output.to(dtype) - target.to(dtype)).square().sum() / squares.clamp_min(1e-20)


def head_kl(
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    head: Head,
    *,
    temperature: float = 1.0,
    direction: Literal["forward", "reverse"] = "forward",
    targets: torch.Tensor | None = None,
    cross_entropy: float = 0.0,
    chunk_tokens: int = 256,
    count: int | None = None,
) -> torch.Tensor:
    """Return temperature² * KL(teacher || student) as a mean over tokens, a scalar.

    hidden and teacher_hidden `[N, D]` are final hidden states under the same frozen head; the
    gradient goes to `hidden` only. `direction` reverse is KL(student || teacher). With targets
    `[N]` the loss is (1 - cross_entropy) * KL + cross_entropy * their cross-entropy (at temperature
    1). At most three float32 buffers of `[chunk_tokens, V]` live at a time (five where the head has
    a soft cap). `count` replaces N as the divisor, where other processes hold more tokens. The
    square keeps gradients of one size over temperatures (Hinton et al., arXiv 1503.02531, section
    2).
    """
    divisor = hidden.shape[0] if count is None else count
    share = 0.0 if targets is None else cross_entropy
    terms = _Terms(
        head=head,
        teacher_hidden=teacher_hidden,
        targets=targets,
        temperature=temperature,
        reverse=direction == "reverse",
        share=share,
    )
    return _HeadLoss.apply(hidden, terms, chunk_tokens, divisor)


def head_cross_entropy(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
    *,
    chunk_tokens: int = 256,
    count: int | None = None,
) -> torch.Tensor:
    """Return the mean cross-entropy of targets `[N]` under hidden states `[N, D]`, a scalar.

    At most two float32 buffers of `[chunk_tokens, V]` live at a time (four where the head has a
    soft cap); see `head_kl`.
    """
    divisor = hidden.shape[0] if count is None else count
    terms = _Terms(head=head, targets=targets, share=1.0)
    return _HeadLoss.apply(hidden, terms, chunk_tokens, divisor)


@dataclass(frozen=True, kw_only=True)
class _Terms:
    """What a loss over the head is made of: `share` of it cross-entropy, the rest KL."""

    head: Head
    teacher_hidden: torch.Tensor | None = None  # [N, D]
    targets: torch.Tensor | None = None  # [N]
    temperature: float = 1.0
    reverse: bool = False
    share: float = 0.0

    @property
    def buffers(self) -> int:
        """How many tensors of [chunk_tokens, V] it works in."""
        return 3 if self.share < 1 else 2

    def chunk(
        self, room: list[torch.Tensor], hidden: torch.Tensor, part: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed loss of a chunk and its slope by the student's logits."""
        loss, slope = hidden.new_zeros((), dtype=torch.float64), None
        if self.share < 1:
            assert self.teacher_hidden is not None
            kind = _reverse_kl_chunk if self.reverse else _kl_chunk
            kl, slope = kind(
                room, hidden, self.teacher_hidden[part], self.head, self.temperature
            )  # the slope is in the last buffer
            loss = kl * ((1 - self.share) * self.temperature**2)
            slope.mul_((1 - self.share) * self.temperature)
        if self.share > 0:
            assert self.targets is not None
            more, other = _cross_entropy_chunk(room[:2], hidden, self.targets[part], self.head)
            loss = loss + more * self.share
            slope = other.mul_(self.share) if slope is None else slope.add_(other, alpha=self.share)
        assert slope is not None
        return loss, slope


class _HeadLoss(torch.autograd.Function):
    """Loss and gradient in one pass over chunks of tokens."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, terms: _Terms, chunk_tokens: int, divisor: int
    ) -> torch.Tensor:
        head = terms.head
        assert not head.weight.requires_grad, "the head must be frozen: its gradient is not made"
        dtype = _work_dtype(head.weight.dtype)
        shape = (min(chunk_tokens, hidden.shape[0]), head.weight.shape[0])
        buffers = [hidden.new_empty(shape, dtype=dtype) for _ in range(terms.buffers)]
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            room = [b[: hidden[part].shape[0]] for b in buffers]
            loss, slope = terms.chunk(room, hidden[part], part)
            total += loss
            if grad is not None:
                step = torch.mm(slope.to(head.weight.dtype), head.weight)
                grad[part] = step.mul_(head.scale / divisor)
        ctx.grad = grad
        return (total / divisor).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[Any, ...]:
        return ctx.grad * upstream.to(ctx.grad.dtype), None, None, None


def _kl_chunk(
    room: list[torch.Tensor],
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    head: Head,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed KL and its slope by the logits, from the difference of hidden states.

    With p = softmax(teacher) and d = student logits - teacher logits, shifted so that sum(p d) = 0:
    r = sum(p expm1(d)) >= 0, KL = log(1 + r), slope = p (expm1(d) - r) / (1 + r). One matmul of the
    difference gives d without cancellation, so a student near its teacher gets a gradient that
    subtracting two softmaxes loses to rounding (in bfloat16 all of it).
    """
    p, d, e = room
    if head.softcap is not None:
        return _kl_chunk_plain(room, hidden, teacher_hidden, head, temperature)
    _centred((p, d, e), teacher_hidden, hidden, teacher_hidden, head, temperature)
    if d.amax() > 80:  # exp would overflow: here rounding is not what hurts
        return _kl_chunk_plain(room, hidden, teacher_hidden, head, temperature)
    torch.expm1(d, out=e)
    # sum(p d) = 0 only up to rounding; where r is small, the sum of expm1(d) - d >= 0 is better.
    second_order = torch.sub(e, d, out=d).mul_(p).sum(-1, keepdim=True).double()
    r = e.mul_(p).sum(-1, keepdim=True)
    log, wide = torch.log1p(r.double()), r.double()
    loss = torch.where(wide > 0.1, log, second_order + (log - wide)).sum()
    return loss, e.addcmul_(p, r, value=-1).div_(1 + r)


def _reverse_kl_chunk(
    room: list[torch.Tensor],
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    head: Head,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed KL(student || teacher) and its slope by the student's logits.

    The same form with the roles exchanged: q = softmax(student), d shifted so that sum(q d) = 0,
    r = sum(q expm1(-d)), KL = log(1 + r), slope = q d.
    """
    q, e, d = room
    if head.softcap is not None:
        return _reverse_kl_chunk_plain(room, hidden, teacher_hidden, head, temperature)
    _centred((q, d, e), hidden, hidden, teacher_hidden, head, temperature)
    if d.amin() < -80:
        return _reverse_kl_chunk_plain(room, hidden, teacher_hidden, head, temperature)
    torch.expm1(torch.neg(d, out=e), out=e)
    r = torch.linalg.vecdot(q, e).double()
    second_order = torch.linalg.vecdot(q, e.add_(d)).double()
    loss = torch.where(r > 0.1, torch.log1p(r), second_order + (torch.log1p(r) - r)).sum()
    return loss, d.mul_(q)


def _centred(
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weighing: torch.Tensor,
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    head: Head,
    temperature: float,
) -> None:
    """Write weights w and gap d `[n, V]` into the first two of `out`; the third is scratch.

    w is the softmax of the logits of `weighing`, d = student logits - teacher logits, shifted so
    that sum(w d) = 0.
    """
    w, d, e = out
    _fill(e, weighing, head, temperature)
    torch.softmax(e, -1, out=w)
    _project(d, hidden.to(e.dtype) - teacher_hidden.to(e.dtype), head)
    d.mul_(head.scale / temperature)
    d.sub_(torch.mul(w, d, out=e).sum(-1, keepdim=True))


def _reverse_kl_chunk_plain(
    room: list[torch.Tensor],
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    head: Head,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same from two log-softmaxes, for any head and any gap."""
    a, teacher, student = room
    _fill(a, teacher_hidden, head, temperature)
    torch.log_softmax(a, -1, out=teacher)
    cap_slope = _fill(a, hidden, head, temperature)
    torch.log_softmax(a, -1, out=student)
    gap = torch.sub(student, teacher, out=teacher)
    weight = torch.exp(student, out=a)
    kl = torch.linalg.vecdot(weight, gap)
    slope = torch.mul(weight, gap.sub_(kl.unsqueeze(-1)), out=student)
    return kl.double().sum(), slope if cap_slope is None else slope.mul_(cap_slope)


def _kl_chunk_plain(
    room: list[torch.Tensor],
    hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    head: Head,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed KL and p_student - p_teacher (times the cap's slope), for any head."""
    a, b, student = room
    cap_slope = _fill(a, hidden, head, temperature)
    torch.log_softmax(a, -1, out=student)
    _fill(a, teacher_hidden, head, temperature)
    torch.log_softmax(a, -1, out=b)
    torch.exp(b, out=a)
    loss = b.sub_(student).mul_(a).sum(-1).double().sum()
    slope = student.exp_().sub_(a)
    return loss, slope if cap_slope is None else slope.mul_(cap_slope)


def _cross_entropy_chunk(
    room: list[torch.Tensor],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    head: Head,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss and p_student - one_hot (times the cap's slope)."""
    logits, student = room
    cap_slope = _fill(logits, hidden, head, 1.0)
    torch.log_softmax(logits, -1, out=student)
    index = targets.unsqueeze(-1)
    loss = -student.gather(-1, index).double().sum()
    slope = student.exp_().scatter_add_(-1, index, student.new_full(index.shape, -1.0))
    return loss, slope if cap_slope is None else slope.mul_(cap_slope)


def _fill(
    out: torch.Tensor, hidden: torch.Tensor, head: Head, temperature: float
) -> torch.Tensor | None:
    """Write logits / temperature of `hidden` [n, D] into out [n, V]; return the cap's slope."""
    _project(out, hidden, head)
    if head.bias is not None:
        out += head.bias
    if head.softcap is not None:
        out.mul_(head.scale / head.softcap).tanh_()
        slope = 1 - out.square()
        out.mul_(head.softcap / temperature)
        return slope
    if head.scale != temperature:
        out.mul_(head.scale / temperature)
    return None


def _project(out: torch.Tensor, hidden: torch.Tensor, head: Head) -> None:
    hidden = hidden.to(head.weight.dtype)
    if out.dtype == head.weight.dtype:
        torch.mm(hidden, head.weight.t(), out=out)
    else:
        out.copy_(torch.mm(hidden, head.weight.t()))


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
