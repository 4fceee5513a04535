"""An independent version of the losses, in NumPy and float64, straight from the equations."""

from types import SimpleNamespace

import numpy as np
import pytest

from l2m_jax.losses import DIVERGENCES


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(a, b):
    """Σ a·log(a/b) with 0·log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0, a * (np.log(a) - np.log(b)), 0.0).sum(-1)


# Divergences in which the student's probabilities are held fixed somewhere.
STOPPED = ("skew_reverse_kl_fixed_mixture", "adaptive_kl", "todi", "taid")


def alpha_beta(p, q, a, b):
    """Eq. 3 of ABKD, and its limits, over entries that both give some probability."""
    seen = (p > 0) & (q > 0)
    p, q = np.where(seen, p, 1), np.where(seen, q, 1)
    if a == b == 0:
        each = 0.5 * (np.log(p) - np.log(q)) ** 2
    elif b == 0:
        each = (p**a * np.log(p**a / q**a) - p**a + q**a) / a**2
    elif a == 0:
        each = (q**b * np.log(q**b / p**b) - q**b + p**b) / b**2
    elif a + b == 0:
        each = (np.log(q**a / p**a) + (q**a / p**a) ** -1 - 1) / a**2
    else:
        each = -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)
    return np.where(seen, each, 0).sum(-1)


def head(p, mu):
    """bool, the teacher's head: of the most probable tokens, as few as reach a probability of `mu`."""
    found = np.zeros(p.shape, bool)
    for at in np.ndindex(p.shape[:-1]):
        total = 0.0
        for v in np.argsort(-p[at], kind="stable"):
            if total >= mu:
                break
            found[(*at, v)], total = True, total + p[(*at, v)]
    return found


def divergence(name, student_logits, teacher_logits, alpha, mixture_student_logits=None):
    """`mixture_student_logits`: what stands for the student where it is held fixed."""
    p, q = np.exp(log_softmax(teacher_logits)), np.exp(log_softmax(student_logits))
    fixed_logits = student_logits if mixture_student_logits is None else mixture_student_logits
    q_mixture = np.exp(log_softmax(fixed_logits))
    if name == "alpha_beta":
        return alpha_beta(p, q, 0.2, 0.7)
    if name == "adaptive_kl":
        gap, in_head = np.abs(p - q_mixture), head(p, 0.5)
        share = np.where(in_head, gap, 0).sum(-1) / gap.sum(-1)
        return share * kl(p, q) + (1 - share) * kl(q, p)
    if name == "todi":
        with np.errstate(divide="ignore", invalid="ignore"):
            w = 1 / (1 + np.exp(-np.log(p / q_mixture)))
            each = w * p * np.log(p / q) + (1 - w) * q * np.log(q / p)
        return np.where((p > 0) & (q > 0), each, 0).sum(-1)
    if name == "taid":
        fixed, teacher = (np.asarray(x, np.float64) for x in (fixed_logits, teacher_logits))
        with np.errstate(invalid="ignore"):  # 0·(−∞) in entries beyond the vocabulary
            mixed = np.nan_to_num((1 - alpha) * fixed + alpha * teacher, nan=-np.inf, neginf=-np.inf)
        return kl(np.exp(log_softmax(mixed)), q)
    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "skew_kl":
        return kl(p, alpha * p + (1 - alpha) * q)
    if name.startswith("skew_reverse_kl"):
        return kl(q, alpha * q_mixture + (1 - alpha) * p)
    if name == "jsd":
        mixture = alpha * p + (1 - alpha) * q
        return alpha * kl(p, mixture) + (1 - alpha) * kl(q, mixture)
    assert name == "total_variation"
    return np.abs(p - q).sum(-1) / 2


def name_of(value):
    return next(name for name, known in DIVERGENCES.items() if known.with_alpha(0.5) == value.with_alpha(0.5))


def cross_entropy(logits, labels):
    return -np.take_along_axis(log_softmax(logits), np.asarray(labels)[..., None], -1)[..., 0]


def token_loss(student_logits, teacher_logits, labels, objective, mixture_student_logits=None):
    temperature = objective.temperature
    student_logits = np.asarray(student_logits, np.float64)
    teacher_logits = np.asarray(teacher_logits, np.float64)
    if mixture_student_logits is not None:
        mixture_student_logits = np.asarray(mixture_student_logits, np.float64) / temperature
    distance = divergence(
        name_of(objective.divergence),
        student_logits / temperature,
        teacher_logits / temperature,
        getattr(objective.divergence, "alpha", None),
        mixture_student_logits,
    )
    return (1 - objective.beta) * cross_entropy(student_logits, labels) + objective.beta * (
        temperature**2 * distance
    )


def token_loss_gradient(student_logits, teacher_logits, labels, objective, step=1e-5):
    """d token_loss / d student_logits by central differences; entries of −∞ have none."""
    student_logits = np.asarray(student_logits, np.float64)
    fixed = student_logits if name_of(objective.divergence) in STOPPED else None
    gradient = np.zeros_like(student_logits)
    for v in range(student_logits.shape[-1]):
        shift = np.zeros(student_logits.shape[-1])
        shift[v] = step
        up = token_loss(student_logits + shift, teacher_logits, labels, objective, fixed)
        down = token_loss(student_logits - shift, teacher_logits, labels, objective, fixed)
        gradient[..., v] = (up - down) / (2 * step)
    return gradient


@pytest.fixture(scope="session")
def oracle():
    return SimpleNamespace(
        alpha_beta=alpha_beta,
        cross_entropy=cross_entropy,
        divergence=divergence,
        token_loss=token_loss,
        token_loss_gradient=token_loss_gradient,
    )
