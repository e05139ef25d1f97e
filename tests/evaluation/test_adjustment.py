"""The adjustment for popularity: fitted on validation, and the same wherever it is applied."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cnsdiff_dist.cli import main
from cnsdiff_dist.commands.train import train
from cnsdiff_dist.data.dataset import load_manifest, read_ids
from cnsdiff_dist.data.graph import GraphArrays
from cnsdiff_dist.distributed.world import World
from cnsdiff_dist.errors import UserError
from cnsdiff_dist.evaluation.adjustment import adjusted, fit_alpha, log_p_exposure, log_p_train
from cnsdiff_dist.inference.trained_model import calibrate, open_trained
from tests.support.ranks import run_ranks
from tests.support.small import small_config


@pytest.fixture(scope="module")
def run(dataset: str, world: World, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("run") / "run")
    train(small_config(dataset, out, train={"epochs": 2, "select_split": "valid_ood"}))
    return out


def test_the_extra_dimension_adds_alpha_log_p() -> None:
    user, item, log_p = torch.randn(5, 4), torch.randn(7, 4), torch.randn(7)
    more = adjusted(user, item, 0.7, log_p)
    assert more[0].shape == (5, 5) and more[1].shape == (7, 5)
    for u in range(5):
        for i in range(7):
            expected = float(user[u] @ item[i] + 0.7 * log_p[i])
            assert float(more[0][u] @ more[1][i]) == pytest.approx(expected, abs=1e-5)
    assert adjusted(user, item, 0.0, log_p) == (user, item)
    assert adjusted(user, item, 0.7, None) == (user, item)


def test_log_p_counts_every_item_once_more(tiny_graph: GraphArrays, world: World) -> None:
    log_p = log_p_train(tiny_graph, world)
    assert torch.allclose(log_p.exp(), torch.tensor([4, 4, 3, 2]) / 13)


def test_a_fit_is_the_best_of_a_scan_and_of_equals_the_nearest_to_zero() -> None:
    best, curve = fit_alpha(lambda a: {"m": -((a - 0.3) ** 2)}, "m", [-0.5, 0, 0.5, 1])
    assert abs(best - 0.3) <= 1 / 16
    assert [point["alpha"] for point in curve] == sorted({point["alpha"] for point in curve})
    assert max(curve, key=lambda point: point["metrics"]["m"])["alpha"] == best
    flat, _ = fit_alpha(lambda a: {"m": 1.0}, "m", [-1, 0.5, 1])
    assert abs(flat) == min(abs(point["alpha"]) for point in _)
    assert fit_alpha(lambda a: {"m": a}, "m", [2.0])[0] == 2.0


def _exposure(dataset: str, folder: Path, **columns: list[object]) -> str:
    path = folder / "exposure.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_a_table_of_exposure(dataset: str, tmp_path: Path, world: World) -> None:
    manifest = load_manifest(dataset)
    ids = read_ids(dataset, manifest, "items")["id"].to_pylist()
    url = _exposure(dataset, tmp_path, item=[ids[3], ids[5], ids[3]], weight=[1.0, 4.0, 2.0])
    p = log_p_exposure(url, dataset, manifest, world).exp() * (7 + manifest.items)
    expected = np.ones(manifest.items)
    expected[3], expected[5] = 4, 5
    assert np.allclose(p.numpy(), expected, rtol=1e-4)
    csv = tmp_path / "exposure.csv"
    csv.write_text(f"item,weight\n{ids[3]},3\n{ids[5]},4\n")
    again = log_p_exposure(str(csv), dataset, manifest, world).exp() * (7 + manifest.items)
    assert torch.allclose(p, again)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"item": ["nobody"], "weight": [1.0]}, "row 1: 'nobody' is not an item"),
        ({"item": [0], "weight": [-1.0]}, "row 1: weight -1.0"),
        ({"item": [0]}, "not a table of item and weight"),
        ({"item": [0], "weight": ["x"]}, "not a table of item and weight"),
    ],
)
def test_a_bad_table_of_exposure_is_one_line(
    dataset: str, tmp_path: Path, columns: dict[str, list[object]], says: str, world: World
) -> None:
    url = _exposure(dataset, tmp_path, **columns)
    with pytest.raises(UserError, match=says):
        log_p_exposure(url, dataset, load_manifest(dataset), world)


def test_calibration_is_used_by_evaluate_export_and_recommend(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", run, "--split", "test_ood", "--json"]) == 0
    records = [json.loads(line) for line in Path(f"{run}/metrics.jsonl").read_text().splitlines()]
    best = max((r for r in records if r["kind"] == "valid_ood"), key=lambda r: r["recall@20"])
    assert json.loads(capsys.readouterr().out)["alpha"] == best["alpha"]
    assert main(["calibrate", run, "--alphas", "0.5", "1", "1.5"]) == 0
    assert "fitted on valid_ood" in capsys.readouterr().out
    found = json.loads(Path(f"{run}/calibration.json").read_text())
    alpha = found["alpha"]
    curve = {p["alpha"]: p["metrics"]["recall@20"] for p in found["curve"]}
    assert alpha > 0 and curve[alpha] == max(curve.values())
    model = open_trained(run, None)
    evaluator = model.run.evaluator("valid_ood")
    log_p_R = log_p_train(model.run.graph, model.run.world)
    vectors = adjusted(model.user_RD, model.item_RD, alpha, log_p_R)
    assert evaluator(*vectors)["metrics"]["recall@20"] == pytest.approx(curve[alpha])

    assert main(["evaluate", run, "--split", "test_ood", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["alpha"] == alpha
    assert Path(f"{run}/evaluations/test_ood.json").exists()
    assert main(["export", run, str(tmp_path / "e")]) == 0
    assert main(["recommend", run, str(tmp_path / "r"), "--k", "3"]) == 0
    side = {name: pq.read_table(tmp_path / "e" / name).to_pydict() for name in ("users", "items")}
    user, item = (np.array(side[name]["embedding"]) for name in ("users", "items"))
    assert user.shape[1] == 17 and json.loads((tmp_path / "e/_SUCCESS").read_text())["dim"] == 17
    rows = pq.read_table(tmp_path / "r").to_pylist()[:30]
    for row in rows:
        u, i = side["users"]["id"].index(row["user"]), side["items"]["id"].index(row["item"])
        assert row["score"] == pytest.approx(float(user[u] @ item[i]), abs=1e-4)
    assert main(["export", run, str(tmp_path / "plain"), "--alpha", "none"]) == 0
    assert json.loads((tmp_path / "plain/_SUCCESS").read_text())["dim"] == 16


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["calibrate", "RUN", "--split", "test_ood"], "never on a test"),
        (["calibrate", "RUN", "--metric", "recall@7"], "--metric recall@7"),
        (["calibrate", "RUN", "--split", "valid_nowhere"], "valid_nowhere is not in this dataset"),
        (["evaluate", "RUN", "--alpha", "much"], "--alpha much: auto, none or a number"),
    ],
)
def test_refusals(
    run: str, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([run if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_calibration_of_another_checkpoint_is_refused(run: str) -> None:
    model = open_trained(run, None)
    found = calibrate(model)
    path = Path(f"{run}/calibration.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "step": found.step + 1}))
    with pytest.raises(UserError, match="calibrate again"):
        model.with_alpha("auto")
    path.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        model.with_alpha("auto")
    path.unlink()


def _calibrated(run: str) -> tuple[float, float]:
    found = calibrate(open_trained(run, None))
    return found.alpha, max(point["metrics"]["recall@20"] for point in found.curve)


@pytest.mark.distributed
def test_two_ranks_find_the_same_alpha(run: str) -> None:
    here = _calibrated(run)
    assert run_ranks(2, _calibrated, run) == [here, here]


def test_the_validation_tries_every_alpha_and_the_best_counts(run: str) -> None:
    lines = [json.loads(line) for line in Path(f"{run}/metrics.jsonl").read_text().splitlines()]
    validations = [line for line in lines if line["kind"] == "valid_ood"]
    assert validations and all(line["alpha"] in (0.0, 0.5, 1.0) for line in validations)
    best = max(validations, key=lambda line: line["recall@20"])
    model = open_trained(run, None)
    assert model.step == best["step"]
    evaluator = model.run.evaluator("valid_ood")
    recalls = {
        alpha: evaluator(*model_vectors(model, alpha))["metrics"]["recall@20"]
        for alpha in (0.0, 0.5, 1.0)
    }
    assert recalls[best["alpha"]] == max(recalls.values()) == pytest.approx(best["recall@20"])


def model_vectors(model, alpha):  # type: ignore[no-untyped-def]
    log_p_R = log_p_train(model.run.graph, model.run.world)
    return adjusted(model.user_RD, model.item_RD, alpha, log_p_R)
