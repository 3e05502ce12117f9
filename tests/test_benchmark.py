"""The benchmark, on a few pictures: what it writes, and that it goes on where an earlier run stopped."""

from __future__ import annotations

import benchmark_training
from conftest import last_json

import common


def test_a_run_writes_everything_and_the_next_one_trains_what_is_missing(tmp_path, capsys):
    options = ["--quick", "--dataset", "fashion_mnist", "--presets", "small", "--width", "16"]
    options += ["--output-dir", str(tmp_path)]
    assert benchmark_training.main([*options, "--seeds", "1"]) == 0
    first = capsys.readouterr()
    assert "earlier run" not in first.err
    file = tmp_path / "frontier.csv"
    mine = benchmark_training.earlier_trainings(file)
    other = [
        row | {"accuracy": 0.5, "seed": 1, "setup": row["setup"].replace("1000 pictures", "2000 pictures")}
        for row in mine
    ]
    common.write_csv(file, mine + other)
    assert benchmark_training.main([*options, "--seeds", "2"]) == 0
    second = capsys.readouterr()
    assert second.err.count("small, seed 0: finished by an earlier run") == 1
    assert "seed 1: finished" not in second.err  # that one was of other pictures
    rows = benchmark_training.earlier_trainings(file)
    assert rows[:2] == mine + other
    assert [row["seed"] for row in rows] == [0, 1, 1]
    before, after = (last_json(shown.out)["presets"]["small"] for shown in (first, second))
    assert (before["n"], after["n"], after["width"], after["optimizer"]) == (1, 2, 16, "Muon")
    assert after["accuracy"] == (mine[0]["accuracy"] + rows[2]["accuracy"]) / 2
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        *("speed.csv", "frontier.csv", "plain.csv", "summary.json", "training_frontier.png")
    }


def test_bad_input_is_one_clear_line(tmp_path, capsys, picture_folder):
    options = ["--quick", "--presets", "small", "--output-dir", str(tmp_path), "--dataset"]
    assert benchmark_training.main([*options, str(picture_folder)]) == 2
    assert "72 training pictures, 256 are needed" in capsys.readouterr().err
    (tmp_path / "frontier.csv").write_text("preset,seed,setup\nsmall\n")
    assert benchmark_training.main([*options, "fashion_mnist", "--width", "16"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("its trainings are measured again")
    assert (tmp_path / "frontier.csv").read_text() == "preset,seed,setup\nsmall\n"
