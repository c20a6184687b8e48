import ast
import itertools
import math
from pathlib import Path

import pytest
import torch
import towers
from experiment import in_process, new_learner, train_reference, train_selected, train_uniform
from sources import PlainSource
from towers import ImageTower, TextTower
from training import Account, Point, Retrieval, Run, Settings, measure_retrieval, new_model, sigmoid_loss, train


def _sigmoid_loss_by_hand(image, text, scale, bias):
    total = 0.0
    for i, one in enumerate(image.double().tolist()):
        for j, other in enumerate(text.double().tolist()):
            logit = scale * sum(a * b for a, b in zip(one, other, strict=True)) + bias
            total += math.log1p(math.exp(-logit if i == j else logit))
    return total / len(image)


def _recall_by_hand(queries, candidates):
    hits = 0
    for row, query in enumerate(queries.double().tolist()):
        similarity = [sum(a * b for a, b in zip(query, other, strict=True)) for other in candidates.double().tolist()]
        hits += max(range(len(similarity)), key=similarity.__getitem__) == row
    return hits / len(queries)


@pytest.fixture
def model():
    return new_model(vocabulary=50, seed=1, batch_size=128)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    return {
        "keys": [str(row) for row in range(12)],
        "image": torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "tokens": torch.randint(0, 50, (12, 16), generator=generator, dtype=torch.int32),
        "index": torch.arange(12),
    }


def test_towers_give_unit_rows_of_the_asked_width(batch):
    for rows in (ImageTower(width=64)(batch["image"]), TextTower(vocabulary=50, width=64)(batch["tokens"])):
        assert rows.dtype == torch.float32
        assert rows.shape == (12, 64)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(12))


def test_a_row_does_not_depend_on_the_rows_beside_it(model, batch):
    for tower, name in ((model.image, "image"), (model.text, "tokens")):
        torch.testing.assert_close(tower(batch[name])[3:4], tower(batch[name][3:4]), atol=1e-6, rtol=1e-5)


def test_padding_says_nothing(model):
    short = torch.tensor([[5, 6, 0]], dtype=torch.int32)
    long = torch.tensor([[5, 6, 0, 0, 0, 0]], dtype=torch.int32)
    torch.testing.assert_close(model.text(short), model.text(long))


def test_an_empty_caption_has_a_finite_embedding(model):
    assert model.text(torch.zeros(1, 16, dtype=torch.int32)).isfinite().all()


def test_the_order_of_words_matters(model):
    one, other = torch.tensor([[5, 6, 7, 8], [7, 6, 5, 8]], dtype=torch.int32)
    assert not torch.allclose(model.text(one[None]), model.text(other[None]))


def test_the_towers_need_nothing_but_torch():
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(Path(towers.__file__).read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported == {"math", "torch"}


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (37.5, -3.0), (1.0, 2.0)])
def test_the_loss_is_siglips(model, batch, scale, bias):
    with torch.no_grad():
        image, text = model(batch["image"], batch["tokens"])
    loss = sigmoid_loss(image, text, torch.tensor(scale), torch.tensor(bias))
    assert loss.item() == pytest.approx(_sigmoid_loss_by_hand(image, text, scale, bias), rel=1e-5)


def test_retrieval_is_recall_at_one_in_both_directions(model, batch):
    retrieval = measure_retrieval(model, batch)
    with torch.no_grad():
        image, text = model(batch["image"], batch["tokens"])
    assert retrieval.image_to_text == pytest.approx(_recall_by_hand(image, text))
    assert retrieval.text_to_image == pytest.approx(_recall_by_hand(text, image))
    assert retrieval.mean == pytest.approx((retrieval.image_to_text + retrieval.text_to_image) / 2)


def test_models_of_one_seed_start_equal_and_leave_the_global_generator_alone():
    before = torch.random.get_rng_state()
    one, other = new_model(50, seed=3, batch_size=128), new_model(50, seed=3, batch_size=128)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert one.log_scale.exp().item() == pytest.approx(10)
    assert one.bias.item() == pytest.approx(math.log(1 / 128))


def test_training_on_the_same_pairs_again_and_again_learns_them(model, batch):
    settings = Settings(steps=60, learning_rate=2e-3, batch_size=12, warmup_steps=5, evaluate_every=30)
    run = train("uniform", model, PlainSource(itertools.repeat(batch), 12), settings, batch)
    assert run.final.retrieval.mean == 1.0
    assert run.points[-1].loss < run.points[0].loss


def test_a_run_keeps_account_of_what_was_loaded_and_trained(prepared, tiny_plan):
    test = prepared.test.batch(torch.arange(50))
    reference, _ = train_reference(prepared, tiny_plan, 0, test)
    uniform = train_uniform(prepared, tiny_plan, 0, test)
    jest = train_selected(prepared, tiny_plan, 0, test, in_process(prepared, tiny_plan, 0, reference))
    assert uniform.account.examples_loaded == uniform.account.examples_trained == 4 * 32
    assert jest.account.examples_loaded == 4 * 160
    assert jest.account.examples_trained == 4 * 32
    assert jest.account.reference_inferences + jest.account.cache_hits == 4 * 160
    assert jest.account.times_seen.sum() == 4 * 160
    assert jest.account.times_trained.sum() == 4 * 32
    assert (jest.account.times_trained <= jest.account.times_seen).all()
    assert [point.step for point in jest.points] == [2, 4]


def test_selection_never_trains_on_a_pair_twice_in_one_step(prepared, tiny_plan):
    learner = new_learner(prepared, tiny_plan, 0)
    source = in_process(prepared, tiny_plan, 0, new_learner(prepared, tiny_plan, 1))(learner)
    keys = next(source)["keys"]
    assert len(keys) == len(set(keys)) == 32


def test_the_same_seed_selects_the_same_pairs(prepared, tiny_plan):
    reference = new_learner(prepared, tiny_plan, 1)
    first, second = (
        next(in_process(prepared, tiny_plan, 0, reference)(new_learner(prepared, tiny_plan, 0)))["keys"]
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("curve", "step"),
    [
        ([0.1, 0.2, 0.3], 2),
        ([0.3, 0.1, 0.25], 3),
        ([0.1, 0.1, 0.1], None),
        ([0.3, 0.3, 0.3], 1),
        ([0.1, 0.3, 0.1], None),
    ],
)
def test_a_level_is_reached_where_the_curve_stays_above_it(curve, step):
    points = [Point(n, n, n, float(n), 0.0, Retrieval(level, level)) for n, level in enumerate(curve, start=1)]
    run = Run("JEST", Settings(steps=3, learning_rate=1e-3), Account(1), points)
    reached = run.reach(0.2)
    assert (reached and reached.step) == step
