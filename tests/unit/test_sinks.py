"""metrics.jsonl is the record whatever its mirrors do; TensorBoard can read its mirror."""

import json
import logging
import math
from pathlib import Path

import pytest

from vlactl.errors import ConfigError
from vlactl.report.sinks import MetricsLog

BROKEN_SINK = """
from vlactl.api.plugins import PluginConfig, SinkPlugin

PLUGIN = SinkPlugin(
    name="broken",
    summary="raises",
    config=PluginConfig,
    factory="broken_sink:make_sink",
    api_version=1,
)

class Broken:
    def log(self, step, metrics):
        raise ConnectionError("no network")

    def close(self):
        raise ConnectionError("no network")

def make_sink(config, run_dir):
    if (run_dir / "no-login").exists():
        raise PermissionError("no login")
    return Broken()
"""


@pytest.fixture
def broken_sink(tmp_path, monkeypatch) -> str:
    """Name of an installed sink that raises whatever it is asked."""
    site = tmp_path / "site"
    info = site / "broken_sink-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "broken_sink.py").write_text(BROKEN_SINK)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-sink\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vlactl.sinks]\nbroken = broken_sink:PLUGIN\n")
    monkeypatch.syspath_prepend(site)
    return "broken"


def lines(run_dir: Path) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_a_line_per_step(tmp_path):
    log = MetricsLog(tmp_path, ())
    log.log(0, {"env/success_once": 0.25})
    log.log(1, {"env/success_once": 0.5, "rollout/rewards": -1.0})
    first, second = lines(tmp_path)
    assert list(first) == ["step", "time", "env/success_once"]
    assert (first["step"], first["env/success_once"]) == (0, 0.25)
    assert (second["step"], second["rollout/rewards"]) == (1, -1.0)
    assert second["time"] >= first["time"] > 1.6e9


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_become_null(tmp_path, value):
    MetricsLog(tmp_path, ()).log(0, {"train/loss": value})
    assert lines(tmp_path)[0]["train/loss"] is None


def test_resuming_forgets_later_steps_and_a_cut_line(tmp_path):
    log = MetricsLog(tmp_path, ())
    for step in range(4):
        log.log(step, {"a": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 0, "ti')
    resumed = MetricsLog(tmp_path, ())
    resumed.resume_from(2)
    resumed.log(2, {"a": 20})
    assert [(line["step"], line["a"]) for line in lines(tmp_path)] == [(0, 0), (1, 1), (2, 20)]


def test_resuming_without_a_record(tmp_path):
    MetricsLog(tmp_path, ()).resume_from(3)
    assert list(tmp_path.iterdir()) == []


def test_a_raising_sink_is_named_once_and_the_record_is_complete(tmp_path, broken_sink, caplog):
    log = MetricsLog(tmp_path, [broken_sink])
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            log.log(step, {"a": 1.0})
        log.close()
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    (record,) = caplog.records
    assert '"broken"' in record.getMessage()
    assert "no network" in record.getMessage()


def test_a_sink_that_cannot_start_is_left_out(tmp_path, broken_sink, caplog):
    (tmp_path / "no-login").touch()
    with caplog.at_level(logging.WARNING):
        log = MetricsLog(tmp_path, [broken_sink])
        log.log(0, {"a": 1.0})
        log.close()
    assert len(lines(tmp_path)) == 1
    (record,) = caplog.records
    assert "no login" in record.getMessage()


def test_an_unknown_sink_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match='unknown sink "tensorbord"'):
        MetricsLog(tmp_path, ["tensorbord"])


def test_tensorboard_reads_the_event_files(tmp_path):
    first = MetricsLog(tmp_path, ["tensorboard"])
    for step in range(3):
        first.log(step, {"train/actor/approx_kl": step / 4, "rollout/rewards": math.nan})
    first.close()
    resumed = MetricsLog(tmp_path, ["tensorboard"])
    resumed.resume_from(1)
    resumed.log(1, {"train/actor/approx_kl": 9.0})
    resumed.close()
    scalars = read_events(tmp_path / "tensorboard", "train/actor/approx_kl")
    assert scalars == [(0, 0.0), (1, 9.0)]


def read_events(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_a_sink_that_logs_nothing_closes(tmp_path):
    MetricsLog(tmp_path, ["tensorboard"]).close()
    assert list(tmp_path.iterdir()) == []
