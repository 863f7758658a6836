"""The fused loss on a GPU: losses, metrics and the gradient of the logits, from logits in bf16, in place.

One program works on one token. It reads both rows of logits once to gather their softmax statistics online (running
maximum, sum and the sums that a KL is made of), and once more to overwrite the student's row with the gradient; a
Jensen-Shannon term needs one reading between. Scale, bias and soft cap are applied on the way, in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _logits(
    pointer, bias, columns, held, inside, scale, cap, BIAS: tl.constexpr, CAP: tl.constexpr, PAD: tl.constexpr
):  # fmt: skip
    """A block of a row as the model means it: cap * tanh((raw + bias) * scale / cap), PAD outside the vocabulary.

    ``held`` says which columns may be read: some beyond the vocabulary, so that reads are wide and aligned.
    """
    raw = tl.load(pointer + columns, mask=held, other=0.0).to(tl.float32)
    if BIAS:
        raw += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    raw *= scale
    if CAP:
        # tanh without cancellation where it matters: exp of a negative number, the sign put back
        shrunk = tl.exp(-2.0 * tl.abs(raw) / cap)
        raw = tl.where(raw < 0, -cap, cap) * (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(inside, raw, PAD)


@triton.jit
def token_losses(
    student, teacher, labels, rows, student_bias, teacher_bias, stride_student, stride_teacher, tokens, vocabulary,
    width, student_scale, student_cap, teacher_scale, teacher_cap, inverse_temperature, mix,
    weight_ce, weight_forward, weight_js,
    TEACHER: tl.constexpr, GRADIENT: tl.constexpr, TEMPERED: tl.constexpr, JS: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, STUDENT_CAP: tl.constexpr, TEACHER_BIAS: tl.constexpr, TEACHER_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses of one token and, in place of its logits, their gradient.

    Args:
        student: logits before bias, scale and cap, [tokens, vocabulary]; overwritten with the gradient if GRADIENT.
        teacher: the teacher's; read only if TEACHER.
        width: columns that rows have room for, at least ``vocabulary``; those beyond it are overwritten with anything.
        labels: int64 [tokens], each within the vocabulary.
        rows: float32 [4, tokens]: weighted loss, KL(teacher || student), cross-entropy, whether both agree on the top.
        inverse_temperature: 1 / temperature; TEMPERED says that it is not 1.
        weight_*: coefficients of the losses, without the squared temperature.
    """
    token = tl.program_id(0)
    student += token.to(tl.int64) * stride_student
    teacher += token.to(tl.int64) * stride_teacher
    low: tl.constexpr = float("-inf")

    # Statistics, online. s and t: student and teacher; hot: at the temperature.
    s_max = tl.full((), low, tl.float32)
    t_max = tl.full((), low, tl.float32)
    s_top = tl.full((), 0, tl.int32)
    t_top = tl.full((), 0, tl.int32)
    s_sum = tl.zeros((), tl.float32)
    t_sum = tl.zeros((), tl.float32)
    s_hot = tl.zeros((), tl.float32)
    t_hot = tl.zeros((), tl.float32)
    gap = tl.zeros((), tl.float32)  # sum of exp(t - t_max) (t - s)
    gap_hot = tl.zeros((), tl.float32)  # the same at the temperature
    for start in range(0, vocabulary, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        held, inside = columns < width, columns < vocabulary
        s = _logits(
            student, student_bias, columns, held, inside, student_scale, student_cap, STUDENT_BIAS, STUDENT_CAP, low
        )
        block_max, block_top = tl.max(s, 0, return_indices=True)
        s_top = tl.where(block_max > s_max, start + block_top, s_top)
        new_max = tl.maximum(s_max, block_max)
        moved = s_max - new_max
        weight = tl.exp(s - new_max)
        s_sum = s_sum * tl.exp(moved) + tl.sum(weight, 0)
        if TEMPERED:
            hot = tl.exp((s - new_max) * inverse_temperature)
            s_hot = s_hot * tl.exp(moved * inverse_temperature) + tl.sum(hot, 0)
        s_max = new_max
        if TEACHER:
            t = _logits(
                teacher, teacher_bias, columns, held, inside, teacher_scale, teacher_cap, TEACHER_BIAS, TEACHER_CAP, low
            )
            apart = tl.where(inside, s - t, 0.0)
            block_max, block_top = tl.max(t, 0, return_indices=True)
            t_top = tl.where(block_max > t_max, start + block_top, t_top)
            new_max = tl.maximum(t_max, block_max)
            moved = t_max - new_max
            weight = tl.exp(t - new_max)
            t_sum = t_sum * tl.exp(moved) + tl.sum(weight, 0)
            gap = gap * tl.exp(moved) - tl.sum(weight * apart, 0)
            if TEMPERED:
                hot = tl.exp((t - new_max) * inverse_temperature)
                t_hot = t_hot * tl.exp(moved * inverse_temperature) + tl.sum(hot, 0)
                gap_hot = gap_hot * tl.exp(moved * inverse_temperature) - tl.sum(hot * apart, 0)
            t_max = new_max

    label = tl.load(labels + token)
    right = _logits(
        student,
        student_bias,
        label,
        label < vocabulary,
        label < vocabulary,
        student_scale,
        student_cap,
        STUDENT_BIAS,
        STUDENT_CAP,
        low,
    )
    s_lse = s_max + tl.log(s_sum)
    cross_entropy = s_lse - right
    loss = weight_ce * cross_entropy
    divergence = tl.zeros((), tl.float32)
    squared = 1.0 / (inverse_temperature * inverse_temperature)
    s_hot_lse = s_lse
    t_hot_lse = tl.zeros((), tl.float32)
    own = tl.zeros((), tl.float32)
    if TEACHER:
        t_lse = t_max + tl.log(t_sum)
        divergence = gap / t_sum - t_lse + s_lse
        t_hot_lse = t_lse
        forward = divergence
        if TEMPERED:
            s_hot_lse = s_max * inverse_temperature + tl.log(s_hot)
            t_hot_lse = t_max * inverse_temperature + tl.log(t_hot)
            forward = gap_hot / t_hot * inverse_temperature - t_hot_lse + s_hot_lse
        loss += squared * weight_forward * forward
        if JS:
            log_mix = tl.log(mix)
            log_rest = tl.log(1.0 - mix)
            theirs = tl.zeros((), tl.float32)
            for start in range(0, vocabulary, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                held, inside = columns < width, columns < vocabulary
                s = _logits(
                    student,
                    student_bias,
                    columns,
                    held,
                    inside,
                    student_scale,
                    student_cap,
                    STUDENT_BIAS,
                    STUDENT_CAP,
                    0.0,
                )
                t = _logits(
                    teacher,
                    teacher_bias,
                    columns,
                    held,
                    inside,
                    teacher_scale,
                    teacher_cap,
                    TEACHER_BIAS,
                    TEACHER_CAP,
                    0.0,
                )
                s = s * inverse_temperature - s_hot_lse
                t = t * inverse_temperature - t_hot_lse
                higher = tl.maximum(t + log_mix, s + log_rest)
                both = higher + tl.log(tl.exp(t + log_mix - higher) + tl.exp(s + log_rest - higher))
                own += tl.sum(tl.where(inside, tl.exp(s) * (s - both), 0.0), 0)
                theirs += tl.sum(tl.where(inside, tl.exp(t) * (t - both), 0.0), 0)
            loss += squared * weight_js * (mix * theirs + (1.0 - mix) * own)
    tl.store(rows + token, loss)
    tl.store(rows + tokens + token, divergence)
    tl.store(rows + 2 * tokens + token, cross_entropy)
    tl.store(rows + 3 * tokens + token, (s_top == t_top).to(tl.float32))

    if GRADIENT:
        # The label's logit is read by every warp; none may overwrite it before.
        tl.debug_barrier()
        hotness = 1.0 / inverse_temperature
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            held, inside = columns < width, columns < vocabulary
            z = _logits(
                student, student_bias, columns, held, inside, student_scale, student_cap, STUDENT_BIAS, STUDENT_CAP, 0.0
            )
            gradient = weight_ce * (tl.exp(z - s_lse) - (columns == label).to(tl.float32))
            if TEACHER:
                t = _logits(
                    teacher,
                    teacher_bias,
                    columns,
                    held,
                    inside,
                    teacher_scale,
                    teacher_cap,
                    TEACHER_BIAS,
                    TEACHER_CAP,
                    0.0,
                )
                s = z * inverse_temperature - s_hot_lse
                t = t * inverse_temperature - t_hot_lse
                share = tl.exp(s)
                gradient += hotness * weight_forward * (share - tl.exp(t))
                if JS:
                    log_mix = tl.log(mix)
                    log_rest = tl.log(1.0 - mix)
                    higher = tl.maximum(t + log_mix, s + log_rest)
                    both = higher + tl.log(tl.exp(t + log_mix - higher) + tl.exp(s + log_rest - higher))
                    gradient += hotness * weight_js * (1.0 - mix) * share * (s - both - own)
            if STUDENT_CAP:
                gradient *= 1.0 - (z / student_cap) * (z / student_cap)
            gradient *= student_scale
            tl.store(student + columns, gradient.to(student.dtype.element_ty), mask=held)
