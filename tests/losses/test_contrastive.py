"""Contrastive losses: their equations by loops, their corners, their limits, and one batch over two processes."""

import math
import os
import warnings

import pytest
import torch
from torch import distributed, multiprocessing

from lib import losses
from lib.losses import contrastive
from lib.losses.contrastive import cosine_similarity, gather

NAMES = ("info_nce", "dcl", "hn_nce", "dhn_nce", "dhn_nce_released")


def features(batch, seed=0):
    return torch.randn(2, batch, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loops(similarity, tau, beta1, beta2, alpha):
    """Mean over rows plus mean over columns of -log(P / (alpha P + Σ W N)), as the papers write it."""
    total = 0.0
    for table, beta in ((similarity, beta1), (similarity.T, beta2)):
        for i, row in enumerate((table / tau).tolist()):
            others = row[:i] + row[i + 1 :]
            weight = [len(others) * math.exp(beta * s) / sum(math.exp(beta * r) for r in others) for s in others]
            rivals = sum(math.exp(s) * w for s, w in zip(others, weight, strict=True))
            total -= math.log(math.exp(row[i]) / (alpha * math.exp(row[i]) + rivals)) / len(row)
    return total


def released_by_loops(similarity, tau, beta1, beta2, alpha, batch):
    """Entry by entry, with masked logits left in as zeros and the weight's divisor taken from the wrong axis."""
    logits, size, total = (similarity / tau).tolist(), len(similarity), 0.0
    for i in range(size):
        for j in range(size):
            own = math.exp(logits[i][i]) if i == j else 1.0
            for of, beta in ((lambda a, b: logits[a][b], beta1), (lambda a, b: logits[b][a], beta2)):
                logit = of(i, j) if i != j else 0.0
                divisor = sum(math.exp(of(j, k)) if k != j else 1.0 for k in range(size))
                rival = (batch - 1) * math.exp(beta * logit) / divisor * math.exp(logit)
                total -= math.log(own / (alpha * own + rival)) / size**2
    return total


@pytest.mark.parametrize("batch", [2, 3, 7])
@pytest.mark.parametrize(
    ("name", "beta1", "beta2", "alpha", "share"),
    [
        ("info_nce@tau=0.2", 0, 0, 1, 0.5),
        ("dcl@tau=0.2", 0, 0, 0, 1),
        ("hn_nce@tau=0.2,beta1=0.4,beta2=1.5", 0.4, 1.5, 1, 1),
        ("hn_nce@tau=0.2,beta1=0.4,beta2=0.1,alpha=0.3", 0.4, 0.1, 0.3, 1),
        ("dhn_nce@tau=0.2,beta1=0.4,beta2=1.5", 0.4, 1.5, 0, 1),
    ],
)
def test_every_loss_is_its_equation(name, beta1, beta2, alpha, share, batch):
    similarity = cosine_similarity(*features(batch))
    expected = share * by_loops(similarity, 0.2, beta1, beta2, alpha)
    assert losses.loss(name)(similarity, None).item() == pytest.approx(expected)


@pytest.mark.parametrize("batch", [2, 6])
@pytest.mark.parametrize("told", [0, 9])
def test_the_released_loss_is_what_its_code_does(batch, told):
    similarity = cosine_similarity(*features(batch))
    value = losses.loss(f"dhn_nce_released@tau=0.3,beta1=0.4,beta2=0.1,alpha=0.5,batch={told}")(similarity, None)
    assert value.item() == pytest.approx(released_by_loops(similarity, 0.3, 0.4, 0.1, 0.5, told or batch))


def test_the_sum_is_the_papers_and_the_mean_the_default():
    similarity = cosine_similarity(*features(6))
    torch.testing.assert_close(contrastive.dhn_nce(similarity, reduction="sum"), 6 * contrastive.dhn_nce(similarity))
    with pytest.raises(ValueError, match="no reduction 'none' of DHN-NCE: use mean, or sum"):
        contrastive.dhn_nce(similarity, reduction="none")


def test_hardness_moves_gradient_to_the_nearest_negative():
    similarity = torch.tensor([[0.9, 0.8, -0.5], [0.8, 0.9, -0.5], [-0.5, -0.5, 0.9]], requires_grad=True)
    share = []
    for beta in (0.0, 1.0):
        (gradient,) = torch.autograd.grad(contrastive.dhn_nce(similarity, beta1=beta, beta2=beta), similarity)
        share.append(gradient[0, 1] / gradient[0, 2])
    assert share[1] > share[0] > 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_have_a_finite_loss_and_gradient(name, scale, dtype):
    similarity = (scale * cosine_similarity(*features(4))).to(dtype).requires_grad_()
    value = losses.loss(f"{name}@tau=0.01")(similarity, None)
    value.backward()
    assert value.dtype == torch.float32 and value.isfinite() and similarity.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_similarities_between_zero_and_one_are_no_probabilities(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses.loss(name)(torch.rand(3, 3), torch.zeros(3, 1, 4, 4))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (torch.zeros(3, 4), r"shape \(3, 4\) are not square: give \[B, B\]"),
        (torch.zeros(3), r"shape \(3,\) are not square"),
        (torch.zeros(1, 1), "batch of 1 pairs has no negatives: give a contrastive loss 2 or more"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_batch_of_pairs_is_one_sentence(name, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        losses.loss(name)(given, None)
    with pytest.raises(ValueError, match="temperature tau is 0: give a number above 0"):
        losses.loss(f"{name}@tau=0")(torch.eye(2), None)


def test_similarity_is_the_cosine_in_full_precision():
    image, text = features(4).float()
    expected = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    with torch.autocast("cpu", torch.bfloat16):
        similarity = cosine_similarity(3 * image, text)
    torch.testing.assert_close(similarity, expected)
    assert cosine_similarity(torch.zeros(2, 3), torch.ones(2, 3)).tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match=r"Images \(4, 5\) and texts \(3, 5\) make no pairs: give both as \[B, D\]"):
        cosine_similarity(image, text[:3])


def one_of_two(rank, folder, pairs):
    """A process with half of the pairs: what it finds for the joint batch, and its own gradient."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    image, text = (part.requires_grad_() for part in pairs.chunk(2, dim=1)[rank].clone())
    value = contrastive.dhn_nce(cosine_similarity(gather(image), gather(text)))
    gradient = torch.autograd.grad(value, (image, text))
    torch.save({"value": value.detach(), "gradient": torch.stack(gradient)}, folder / f"{rank}.pt")
    distributed.barrier()
    # Gloo's threads may still hold tensors of Python's: freed while the interpreter ends, they abort the process.
    os._exit(0)


def test_two_processes_compute_the_loss_of_the_joint_batch(tmp_path):
    pairs = features(6).requires_grad_()
    joint = contrastive.dhn_nce(cosine_similarity(*map(gather, pairs)))  # alone, gather changes nothing
    joint.backward()
    multiprocessing.spawn(one_of_two, (tmp_path, pairs.detach()), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for part in found:
        torch.testing.assert_close(part["value"], joint.detach())
    # Both processes hold the loss, so that its gradient arrives twice; DistributedDataParallel takes the mean.
    torch.testing.assert_close(torch.cat([part["gradient"] for part in found], dim=1) / 2, pairs.grad)
