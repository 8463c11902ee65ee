"""fit(): what is learned, what is kept, and that an interruption changes nothing."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from lib.data import Feed, ImageCache, load_dataset
from lib.losses import loss
from lib.models import Prediction
from lib.text import Prompts
from lib.training import Budget, average_decay, cyclic_rate, fit, foreground_dice, labelled, learning_rate, order

BUDGET = Budget(steps=24, batch=4, lr=0.02, validate_every=6)


class Interrupted(Exception):
    pass


@pytest.fixture
def feeds(tiny_dataset):
    """Training and validation feed; each side has its own vector as local prompt."""
    source = load_dataset(tiny_dataset)
    vectors = dict(zip(("disc on the left", "disc on the right"), 2 * torch.eye(8)[:2], strict=True))

    def feed(split, augment="none"):
        cache = ImageCache.load(source.split(split), 16)
        texts = [case.prompts["local"] for case in cache.cases]
        pooled = torch.stack([vectors[text] if text else torch.zeros(8) for text in texts])
        present = torch.tensor([text is not None for text in texts])
        return Feed(cache, Prompts({"local": pooled}, {"local": present}), augment)

    return feed("train", "photometric"), feed("val")


def train(model, feeds, budget=BUDGET, **given):
    given = {"seed": 3, "device": "cpu", **given}
    return fit(model, loss("dice_bce"), *feeds, budget, **given)


def same(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def stop_at(step):
    def on_step(done, value):
        if done == step:
            raise Interrupted

    return on_step


def test_an_epoch_takes_every_case_once_and_the_next_in_another_order():
    drawn = torch.cat([order(seed=1, cases=10, batch=4, step=step) for step in range(5)])
    assert drawn[:10].sort().values.tolist() == drawn[10:].sort().values.tolist() == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert order(2, 10, 4, 0).tolist() != drawn[:4].tolist()
    assert len(order(seed=0, cases=3, batch=8, step=0)) == 8


def test_the_learning_rate_rises_to_its_value_and_falls_to_nearly_zero():
    rates = [learning_rate(Budget(steps=100, lr=0.5, warmup=0.1), step) for step in range(100)]
    assert rates[0] == pytest.approx(0.05) and max(rates) == rates[9] == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.001
    assert rates[55] == pytest.approx(0.25)


def rates(schedule, **given):
    budget = Budget(steps=60, lr=0.5, warmup=0, schedule=schedule, **given)
    return [learning_rate(budget, step) for step in range(60)]


def test_the_polynomial_falls_as_in_nnunet_after_a_warm_up():
    assert rates("poly")[:2] == [0.5, pytest.approx(0.5 * (59 / 60) ** 0.9)] and rates("poly")[-1] < 0.02
    warm = Budget(steps=60, lr=0.5, warmup=0.1, schedule="poly")
    assert learning_rate(warm, 2) == 0.25 and learning_rate(warm, 30) == rates("poly")[30]


@pytest.mark.parametrize(("schedule", "end"), [("cyclic", (1 - 16 / 60) ** 0.9), ("cyclic_full", 0.2**0.9)])
def test_a_cyclic_rate_falls_stays_and_starts_anew(schedule, end):
    found = rates(schedule, cycles=3)
    assert found[:20] == found[20:40] == found[40:] and found[0] == 0.5
    assert found[:17] == sorted(found[:17], reverse=True) and found[16:20] == [pytest.approx(0.5 * end)] * 4
    assert rates(schedule) != found and rates(schedule, cycles=3, gamma=0.5)[16] > found[16]


def test_the_released_cycle_keeps_its_constant_whatever_the_rate():
    published, other = ([cyclic_rate(lr, epoch, 60, 3, 0.8) for epoch in range(60)] for lr in (0.01, 0.1))
    assert published == pytest.approx([rate / 50 for rate in rates("cyclic", cycles=3)])
    assert [epoch for epoch in range(60) if other[epoch] != published[epoch]] == [0, 20, 40]


def test_dice_of_known_masks():
    mask = torch.zeros(3, 1, 2, 2)
    mask[:2, :, 0] = 1
    logits = torch.full_like(mask, -1.0)
    logits[0, 0, 0, 0] = 1
    assert foreground_dice(logits, mask).tolist() == pytest.approx([2 / 3, 0, 1])  # half found, missed, both empty


def test_training_learns_and_leaves_the_best_weights(tiny_model, feeds):
    model = tiny_model()
    result = train(model, feeds, Budget(steps=80, batch=4, lr=0.03, validate_every=10))
    log = result.log
    assert list(log.columns) == ["step", "lr", "loss", "valid_score"] and log["step"].tolist() == list(
        range(10, 81, 10)
    )
    assert log["loss"].iloc[-1] < 0.7 * log["loss"].iloc[0]
    best = log.loc[log["valid_score"].idxmax()]
    assert best["valid_score"] > 0.5 and result.best_step == best["step"]
    batch = feeds[1].batch(torch.arange(len(feeds[1])))
    assert not model.training
    with torch.no_grad():
        dice = foreground_dice(model(batch.image, batch.prompts).logits, batch.mask).mean()
    assert dice == pytest.approx(best["valid_score"])
    assert result.seconds > 0 and result.resumed_at == 0


def test_of_equally_good_weights_the_earliest_are_kept(tiny_model, feeds):
    model, early = tiny_model(), tiny_model()
    budget = Budget(steps=6, batch=4, lr=1e-9, validate_every=2)  # too small to change any prediction
    result = train(model, feeds, budget)
    assert result.log["valid_score"].nunique() == 1 and result.best_step == 2
    with pytest.raises(Interrupted):
        train(early, feeds, budget, on_step=stop_at(2))
    assert same(model, early)


def test_a_seed_decides_everything_and_the_caller_keeps_its_random_state(tiny_model, feeds):
    first, again, other = tiny_model(), tiny_model(), tiny_model()
    torch.manual_seed(1)
    train(first, feeds)
    after = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), after)
    train(again, feeds)
    train(other, feeds, seed=4)
    assert same(first, again) and not same(first, other)


@pytest.mark.parametrize("ema", [None, 0.9])
def test_an_interrupted_training_ends_with_the_same_numbers(tiny_model, feeds, tmp_path, ema):
    budget = Budget(steps=24, batch=5, lr=0.02, validate_every=6, ema=ema)
    straight, broken, resumed = tiny_model(), tiny_model(), tiny_model()
    expected = train(straight, feeds, budget, prompt_dropout=0.3)
    checkpoint = tmp_path / "checkpoints" / "run.pt"
    with pytest.raises(Interrupted):
        train(broken, feeds, budget, prompt_dropout=0.3, checkpoint=checkpoint, on_step=stop_at(15))
    result = train(resumed, feeds, budget, prompt_dropout=0.3, checkpoint=checkpoint)
    assert result.resumed_at == 12 and same(straight, resumed)
    assert result.log.equals(expected.log) and result.best_step == expected.best_step
    before = torch.load(checkpoint, weights_only=True)
    finished = tiny_model()
    again = train(finished, feeds, budget, prompt_dropout=0.3, checkpoint=checkpoint)
    assert again.resumed_at == 24 and same(straight, finished) and again.seconds == before["seconds"]
    assert [path.name for path in checkpoint.parent.iterdir()] == ["run.pt"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_last_weights_of_each_cycle_are_kept_over_an_interruption(tiny_model, feeds, tmp_path, optimizer):
    settings = {"optimizer": optimizer, "schedule": "cyclic", "cycles": 2, "snapshots": 2}
    budget = Budget(steps=24, batch=4, lr=0.01, validate_every=3, **settings)
    straight = train(tiny_model(), feeds, budget)
    with pytest.raises(Interrupted):
        train(tiny_model(), feeds, budget, checkpoint=tmp_path / "run.pt", on_step=stop_at(11))
    resumed = train(tiny_model(), feeds, budget, checkpoint=tmp_path / "run.pt")
    assert resumed.resumed_at == 9 and len(straight.snapshots) == 4
    for kept, again in zip(straight.snapshots, resumed.snapshots, strict=True):
        assert kept.keys() == again.keys() and all(torch.equal(kept[name], again[name]) for name in kept)
    # They are the weights at steps 9, 12, 21 and 24: each gives the score that was logged there.
    scores, model = straight.log.set_index("step")["valid_score"], tiny_model().eval()
    batch = feeds[1].batch(torch.arange(len(feeds[1])))
    for kept, step in zip(straight.snapshots, (9, 12, 21, 24), strict=True):
        model.load_state_dict(kept)
        with torch.no_grad():
            dice = foreground_dice(model(batch.image, batch.prompts).logits, batch.mask).mean()
        assert dice == pytest.approx(scores[step])


def test_no_snapshots_are_kept_unless_asked_for(tiny_model, feeds):
    assert train(tiny_model(), feeds).snapshots == []


def test_seconds_add_up_over_resumes(tiny_model, feeds, tmp_path):
    with pytest.raises(Interrupted):
        train(tiny_model(), feeds, checkpoint=tmp_path / "run.pt", on_step=stop_at(13))
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    torch.save({**saved, "seconds": 1000.0}, tmp_path / "run.pt")
    assert 1000 < train(tiny_model(), feeds, checkpoint=tmp_path / "run.pt").seconds < 1100


@pytest.mark.parametrize("change", ["seed", "budget", "dropout", "data", "model"])
def test_a_checkpoint_of_another_run_is_refused(tiny_model, feeds, tmp_path, change):
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        train(tiny_model(), feeds, checkpoint=checkpoint, on_step=stop_at(7))
    given = {"seed": {"seed": 9}, "dropout": {"prompt_dropout": 0.1}, "budget": {"budget": Budget(steps=25)}}
    with pytest.raises(ValueError, match="belongs to another run"):
        train(
            tiny_model(width=7) if change == "model" else tiny_model(),
            (feeds[1], feeds[0]) if change == "data" else feeds,
            checkpoint=checkpoint,
            **given.get(change, {}),
        )


def test_a_damaged_checkpoint_is_named(tiny_model, feeds, tmp_path):
    (tmp_path / "run.pt").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(ValueError, match=r"run\.pt is damaged: delete it"):
        train(tiny_model(), feeds, checkpoint=tmp_path / "run.pt")


def test_a_loss_that_is_no_number_stops_with_its_step(tiny_model, feeds):
    calls = []

    def fails_at_nine(logits, mask):
        calls.append(1)
        return loss("dice_bce")(logits, mask) * (math.nan if len(calls) >= 9 else 1)

    with pytest.raises(FloatingPointError, match=r"loss stopped being finite at step 9 of 24: lower Budget\.lr"):
        fit(tiny_model(), fails_at_nine, *feeds, BUDGET, seed=0, device="cpu")


def test_a_gradient_that_is_no_number_is_noticed_where_the_loss_is_finite(tiny_model, feeds):
    def root_at_zero(logits, mask):
        return (logits.mean() * 0).sqrt()

    with pytest.raises(FloatingPointError, match="gradient stopped being finite at step 1 of 24"):
        fit(tiny_model(), root_at_zero, *feeds, BUDGET, seed=0, device="cpu")


def test_frozen_parts_do_not_move(tiny_model, feeds, tmp_path):
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            return super().train(False)

    model = tiny_model()
    model.stem = Frozen(*model.stem).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, feeds, Budget(steps=6, batch=4, validate_every=6, weight_decay=0.5), checkpoint=tmp_path / "run.pt")
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"text.weight", "text.bias", "head.weight", "head.bias"}
    assert "stem.0.weight" not in torch.load(tmp_path / "run.pt", weights_only=True)["model"]


def test_weights_decay_and_biases_do_not(tiny_model, feeds):
    model = tiny_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    budget = Budget(steps=1, batch=4, lr=0.1, weight_decay=5.0, warmup=0, validate_every=1)
    fit(model, lambda logits, mask: logits.sum() * 0, *feeds, budget, seed=0, device="cpu")
    values = {name: parameter.unique().tolist() for name, parameter in model.named_parameters()}
    assert values["head.weight"] == values["text.weight"] == pytest.approx([0.5])
    assert values["head.bias"] == values["stem.1.weight"] == [1.0]


def test_momentum_is_that_of_nnunet(tiny_model, feeds):
    model, calls = tiny_model(), []
    model.score = lambda prediction, batch: torch.full((len(batch),), float(len(calls)))  # later is better
    before = model.head.bias.item()

    def slope_of_one(logits, mask):
        calls.append(1)
        return 0 * logits.mean() + model.head.bias.sum()

    budget = Budget(steps=2, batch=4, lr=0.1, warmup=0, clip=100, optimizer="sgd", schedule="poly", validate_every=1)
    fit(model, slope_of_one, *feeds, budget, seed=0, device="cpu")
    first, second = 1, 1 + 0.99  # momentum; Nesterov looks one step ahead
    moved = 0.1 * (1 + 0.99 * first) + 0.1 * 0.5**0.9 * (1 + 0.99 * second)
    assert before - model.head.bias.item() == pytest.approx(moved)


class Drawing(nn.Module):
    """A model that is told where the foreground is, with noise, and scored by how bright its images are."""

    def __init__(self, model):
        super().__init__()
        self.model, self.drawn = model, []

    def forward(self, image, prompts):
        return self.model(image, prompts)

    def draw(self, mask, generator):
        vectors = mask.mean((1, 2, 3))[:, None] + torch.rand(len(mask), 8, generator=generator)
        self.drawn.append((self.training, vectors))
        return Prompts({"local": vectors}, {"local": torch.ones(len(mask), dtype=torch.bool)})

    def score(self, prediction, batch):
        assert prediction.logits.shape == batch.mask.shape
        return batch.prompts.pooled["local"].mean(1)


def test_a_model_may_draw_its_prompts_and_score_itself(tiny_model, feeds, tmp_path):
    model, broken, resumed = (Drawing(tiny_model()) for _ in range(3))
    result = train(model, feeds)
    asked = [torch.cat([v for training, v in model.drawn if training is which]) for which in (True, False)]
    assert len(asked[0].unique(dim=0)) == len(asked[0]) == 24 * 4  # new ones at each step
    assert len(asked[1].unique(dim=0)) == len(feeds[1])  # the same ones at each validation
    assert result.log["valid_score"].tolist() == pytest.approx([asked[1][: len(feeds[1])].mean().item()] * 4)
    with pytest.raises(Interrupted):
        train(broken, feeds, checkpoint=tmp_path / "run.pt", on_step=stop_at(15))
    assert train(resumed, feeds, checkpoint=tmp_path / "run.pt").resumed_at == 12 and same(model, resumed)
    assert torch.equal(model.drawn[-1][1], resumed.drawn[-1][1])


def test_drawn_prompts_cannot_be_dropped(tiny_model, feeds):
    with pytest.raises(
        ValueError, match="draws its prompts itself, so there are none to drop: set prompt_dropout to 0"
    ):
        train(Drawing(tiny_model()), feeds, prompt_dropout=0.5)


def test_patience_ends_a_training_that_stopped_improving(tiny_model, feeds):
    result = train(tiny_model(), feeds, Budget(steps=50, batch=4, lr=1e-9, validate_every=2, patience=3))
    assert result.log["step"].tolist() == [2, 4, 6, 8] and result.best_step == 2


def test_the_average_of_weights_is_what_is_validated_and_kept(tiny_model, feeds):
    averaged, plain = tiny_model(), tiny_model()
    budget = Budget(steps=6, batch=4, lr=0.05, validate_every=6, ema=0.999)
    train(averaged, feeds, budget)
    train(plain, feeds, Budget(steps=6, batch=4, lr=0.05, validate_every=6))
    start = tiny_model().head.weight
    # An average of the path lies nearer to the start than its end.
    assert 0 < (averaged.head.weight - start).norm() < (plain.head.weight - start).norm()
    assert averaged.stem[1].num_batches_tracked == 6


def test_prompt_dropout_of_one_is_training_without_text(tiny_model, feeds):
    dropped, without = tiny_model(), tiny_model()
    train(dropped, feeds, prompt_dropout=1.0)
    bare = Feed(feeds[0].cache, feeds[0].prompts.without(), "photometric")
    train(without, (bare, feeds[1]))
    assert same(dropped, without)


def test_nothing_is_printed_where_nobody_watches(tiny_model, feeds, capfd):
    train(tiny_model(), feeds)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("field", [{"steps": 0}, {"batch": -1}, {"precision": "64"}, {"lr": 0.0}])
def test_an_impossible_budget_is_refused(field):
    with pytest.raises(ValueError, match=f"Budget.{next(iter(field))} is "):
        Budget(**field)


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ({"optimizer": "adam"}, "Budget.optimizer is 'adam': use one of adamw, sgd, lamb"),
        ({"schedule": "step"}, "Budget.schedule is 'step': use one of cosine, restart, exponential, poly"),
        ({"cycles": 2}, "cycles is 2 for 60 steps of the schedule 'cosine': .* 1 unless the schedule is cyclic"),
        ({"cycles": 7, "schedule": "cyclic"}, "cycles is 7 for 60 steps .*: give a number that divides the steps"),
        ({"gamma": 0.0}, "Budget.gamma is 0.0: give a share above 0 and up to 1"),
        ({"snapshots": 4, "cycles": 3, "schedule": "cyclic"}, "snapshots is 4, but a cycle of 20 steps is validated"),
        ({"snapshots": -1}, "snapshots is -1"),
    ],
)
def test_an_impossible_schedule_is_refused(field, sentence):
    with pytest.raises(ValueError, match=sentence):
        Budget(steps=60, validate_every=10, **field)


# --- several structures, and what is not a mask


def test_an_unlabelled_structure_reaches_no_loss():
    logits = torch.randn(2, 3, 4, 4, 4, requires_grad=True)
    mask = torch.randint(0, 2, (2, 3, 4, 4, 4)).float()
    mask[1, 2] = -1
    chosen, truth = labelled(logits, mask)
    assert chosen.shape == truth.shape == (5, 1, 4, 4, 4) and truth.min() == 0
    loss("dice_bce")(chosen, truth).backward()
    assert not logits.grad[1, 2].any() and logits.grad.flatten(2).any(2).sum() == 5
    one = torch.zeros(2, 1, 4, 4)
    assert labelled(one, one)[0] is one


def test_the_validation_dice_averages_the_labelled_structures():
    mask = torch.zeros(1, 3, 2, 2)
    mask[0, 0, 0], mask[0, 2] = 1, -1
    logits = torch.full((1, 3, 2, 2), -1.0)
    logits[0, 0, 0, 0] = 1
    assert foreground_dice(logits, mask).tolist() == [pytest.approx((2 / 3 + 1) / 2)]


def test_duplus_schedules_restart_and_rise_exponentially():
    budget = Budget(steps=400, lr=1.0, warmup=0.0125, schedule="restart")
    restart = [learning_rate(budget, step) for step in range(400)]
    assert restart[4] == 1 and restart[199] < 0.001 and restart[200] == pytest.approx(0.01)
    assert restart[210] == pytest.approx(1) and min(restart[210:]) == pytest.approx(0.01)
    rising = [learning_rate(Budget(steps=100, lr=1.0, warmup=0.1, schedule="exponential"), s) for s in range(100)]
    assert rising[0] < 1e-4 and rising[10] == pytest.approx(1) and rising[99] < 0.02


def test_a_young_average_forgets_its_random_start():
    assert [average_decay(0.99, step) for step in (0, 1, 3, 500)] == [0, 0.5, 0.75, 0.99]


def test_a_part_of_a_model_may_learn_at_a_share_of_the_rate(tiny_model, feeds):
    moved = []
    for rates in ({}, {"text.": 0.0}):
        model, start = tiny_model(), tiny_model()
        model.rates = rates
        train(model, feeds, Budget(steps=3, batch=4, lr=0.02, validate_every=3))
        moved.append(
            {name for name, p in model.named_parameters() if not torch.equal(p, dict(start.named_parameters())[name])}
        )
    assert {"text.weight", "text.bias"} <= moved[0] and moved[1] == moved[0] - {"text.weight", "text.bias"}


def test_lamb_learns_too(tiny_model, feeds):
    model = tiny_model()
    result = train(model, feeds, Budget(steps=24, batch=4, lr=0.02, validate_every=6, optimizer="lamb"))
    assert result.log["loss"].iloc[-1] < result.log["loss"].iloc[0]


class Risk(nn.Module):
    """One number per image, which the loss compares with the outcome and not with the mask."""

    learns = "outcome"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image, prompts):
        return Prediction(image.mean((1, 2, 3))[:, None] * self.weight, {})

    def score(self, prediction, batch):
        return -(prediction.logits[:, 0] - batch.outcome[:, 0]).square()


def test_a_model_of_outcomes_is_fitted_to_them(feeds):
    train_feed, valid = feeds
    for feed in feeds:
        feed.cache = replace(feed.cache, outcomes=torch.full((len(feed), 2), 3.0))
    model = Risk()
    fit(
        model,
        lambda logits, outcome: (logits[:, 0] - outcome[:, 0]).square().mean(),
        train_feed,
        valid,
        Budget(steps=60, batch=4, lr=0.3, warmup=0.0, weight_decay=0.0, validate_every=20),
        seed=0,
        device="cpu",
    )
    brightness = valid.cache.images.mean()
    assert model.weight.item() * brightness == pytest.approx(3, abs=0.5)


class Offset(nn.Module):
    """A model that learns by its own objective: the mean of the masks, through the loss it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image, prompts):
        return Prediction(self.weight.expand(len(image), 1, *image.shape[2:]), {})

    def objective(self, batch, loss):
        mean = batch.mask.flatten(1).mean(1, keepdim=True)
        return loss(self.weight.expand_as(mean), mean)


def test_a_model_with_an_objective_learns_by_it(feeds):
    train_feed, valid = feeds
    model = Offset()
    fit(
        model,
        lambda value, mean: (value - mean).square().mean(),
        train_feed,
        valid,
        Budget(steps=80, batch=len(train_feed), lr=0.05, warmup=0.0, weight_decay=0.0, validate_every=80),
        seed=0,
        device="cpu",
    )
    assert model.weight.item() == pytest.approx(train_feed.cache.masks.float().mean().item(), abs=0.02)
