"""An independent version of the losses, in NumPy and float64, straight from the equations."""

from types import SimpleNamespace

import numpy as np
import pytest


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def kl(a, b):
    """Σ a·log(a/b) with 0·log 0 = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a > 0, a * (np.log(a) - np.log(b)), 0.0).sum(-1)


def divergence(name, student_logits, teacher_logits, alpha, mixture_student_logits=None):
    """`mixture_student_logits`: what stands for the student inside the mixture, where it is held fixed."""
    p, q = np.exp(log_softmax(teacher_logits)), np.exp(log_softmax(student_logits))
    q_mixture = q if mixture_student_logits is None else np.exp(log_softmax(mixture_student_logits))
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


def cross_entropy(logits, labels):
    return -np.take_along_axis(log_softmax(logits), np.asarray(labels)[..., None], -1)[..., 0]


def token_loss(student_logits, teacher_logits, labels, objective, mixture_student_logits=None):
    temperature = objective.temperature
    student_logits = np.asarray(student_logits, np.float64)
    teacher_logits = np.asarray(teacher_logits, np.float64)
    if mixture_student_logits is not None:
        mixture_student_logits = np.asarray(mixture_student_logits, np.float64) / temperature
    distance = divergence(
        objective.divergence,
        student_logits / temperature,
        teacher_logits / temperature,
        objective.alpha,
        mixture_student_logits,
    )
    return (1 - objective.beta) * cross_entropy(student_logits, labels) + objective.beta * (
        temperature**2 * distance
    )


def token_loss_gradient(student_logits, teacher_logits, labels, objective, step=1e-5):
    """d token_loss / d student_logits by central differences; entries of −∞ have none."""
    student_logits = np.asarray(student_logits, np.float64)
    fixed = student_logits if objective.divergence == "skew_reverse_kl_fixed_mixture" else None
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
        cross_entropy=cross_entropy,
        divergence=divergence,
        token_loss=token_loss,
        token_loss_gradient=token_loss_gradient,
    )
