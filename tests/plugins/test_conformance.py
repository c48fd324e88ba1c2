"""The contract's checks: built-ins keep it, and each way to break it is found."""

from __future__ import annotations

import pytest

from vlactl.api import conformance, registry

HEAD = """
    {imports}
    from pydantic import BaseModel, ConfigDict, Field
    from vlactl.api.contracts import EnvSpec, Task
    from vlactl.api.plugins import EnvironmentConfig, EnvironmentPlugin

    class Config(EnvironmentConfig):
        name: str = "{name}"
        {fields}

    def spec(config):
        {body}
        tasks = ({tasks})
        return EnvSpec(
            cameras={{"front": (8, 8)}}, state_dim=1, action_dim={action_dim},
            max_episode_steps=8, control_hz=1.0, tasks=tasks,
        )

    PLUGIN = EnvironmentPlugin(
        name="{name}", summary="made up", config=Config, factory="{factory}",
        spec="{name}_module:spec", api_version=1,
    )
"""
TASK = 'Task(index=0, name="a", instruction="do a", num_trials=1),'


@pytest.fixture
def findings(fake_distribution):
    """Install a plugin with something wrong in it, and what the checks say about it."""

    def examine(name, **changes):
        parts = {
            "imports": "",
            "fields": "",
            "body": "",
            "tasks": TASK,
            "action_dim": 1,
            "factory": "nowhere:make",
        }
        source = HEAD.format(name=name, **(parts | changes))
        entry_points = {"vlactl.environments": {name: f"{name}_module:PLUGIN"}}
        fake_distribution(f"{name}-dist", entry_points, {f"{name}_module.py": source})
        found = conformance.check("environment", name, play=False)
        assert conformance.failed(found) == any(finding.level == "FAIL" for finding in found)
        return [f"{f.subject}: {f.detail}" for f in found if f.level != "ok"]

    return examine


BUILT_INS = [(kind, name) for kind in registry.KINDS for name in registry.names(kind)]


@pytest.mark.parametrize(("kind", "name"), BUILT_INS)
def test_built_ins_keep_the_contract(kind, name):
    found = conformance.check(kind, name, play=name == "toy")
    assert not conformance.failed(found), found
    if (kind, name) == ("environment", "toy"):
        assert found[-1].detail == "16 steps, played twice with the same results"


def test_a_correct_plugin_passes(findings):
    assert findings("fine") == []


def test_a_descriptor_that_imports_torch_is_named(findings):
    assert findings("heavy", imports="import torch") == [
        "descriptor heavy_module: imports torch",
        "spec: imports torch",
    ]


def test_a_spec_that_imports_something_heavy_is_named(findings):
    pretended = "import sys; sys.modules['jax'] = sys"
    assert findings("slow", body=pretended) == ["spec: imports jax"]


@pytest.mark.parametrize(
    ("number", "changes", "expected"),
    [
        (0, {"tasks": ""}, "spec: tasks: at least one"),
        (1, {"tasks": TASK * 2}, "spec: tasks: indices must be"),
        (2, {"action_dim": 0}, "spec: action_dim"),
        (3, {"body": "return None"}, "spec: returns a NoneType, not an EnvSpec"),
        (4, {"body": "raise ValueError(3)"}, "spec: ValueError: 3"),
        (5, {"factory": "no colon"}, 'factory: "no colon"'),
        (6, {"fields": "path: str"}, "config Config: cannot be built from defaults: path"),
        (7, {"fields": "size: int = 3"}, "config Config: keys without a description: size"),
        (
            8,
            {"fields": "model_config = ConfigDict(extra='allow')"},
            "config Config: Config accepts unknown keys",
        ),
        (
            9,
            {"fields": "model_config = ConfigDict(frozen=False)"},
            "config Config: Config is not frozen",
        ),
        (
            10,
            {"tasks": TASK.replace("trials=1", "trials=1, num_eval_trials=2")},
            'spec: task "a": num_eval_trials must lie between 1 and num_trials',
        ),
    ],
)
def test_each_mistake_is_found(findings, number, changes, expected):
    assert any(line.startswith(expected) for line in findings(f"wrong{number}", **changes))


def test_a_plugin_that_cannot_be_loaded_fails():
    [finding] = conformance.check("environment", "nowhere-to-be-found")
    assert finding.level == "FAIL"


# A counter in a process of its own ("pool") or not ("here"), with one part replaced by a mistake.
PLAYABLE = """
    import numpy as np
    from vlactl.api.contracts import ChunkResult, EnvSpec, Observation, Outcome, SlotEvent, Task
    from vlactl.api.plugins import EnvironmentConfig, EnvironmentPlugin
    from vlactl.api.simulators import SimulatorPool
    from vlactl.errors import ConfigError, EnvironmentNotReadyError

    class Config(EnvironmentConfig):
        name: str = "{name}"

    def spec(config):
        return EnvSpec(
            cameras={{"front": (8, 6), "back": (4, 4)}}, state_dim=2, action_dim=3,
            max_episode_steps=6, control_hz=1.0,
            tasks=(Task(index=0, name="a", instruction="do a", num_trials=1),),
        )

    def pool(config, context):
        return SimulatorPool("{name}_module:simulator", config, context, spec(config))

    def simulator(config, context):
        return Counter()

    def here(config, context):
        return Here()

    class Counter:
        plays = 0

        def begin(self, episode):
            {begin}
            self.steps, self.plays = 0, self.plays + 1
            return ChunkResult(rewards=np.zeros(0, np.float32), observation=self.observe())

        def advance(self, actions_KA):
            assert actions_KA.shape == (4, 3) and actions_KA.dtype == np.float64
            executed = min(len(actions_KA), 6 - self.steps)
            self.steps += executed
            rewards = {rewards}
            if self.steps < 6:
                return ChunkResult(rewards=rewards, observation=self.observe())
            outcome = Outcome(
                success_step=None, success_at_end=False, terminated=False, num_steps={num_steps}
            )
            return ChunkResult(rewards=rewards, outcome=outcome, observation={final})

        def observe(self):
            return Observation(
                images={{"{camera}": {picture}}}, state={state}, instruction="{instruction}"
            )

        def close(self):
            pass

    class Here(Counter):
        def begin(self, slot, episode):
            self.event = SlotEvent(slot=slot, result=super().begin(episode))

        def advance(self, slot, actions_KA):
            self.event = SlotEvent(slot=slot, result=super().advance(actions_KA))

        def wait(self, at_least, timeout):
            return {events}

    PLUGIN = EnvironmentPlugin(
        name="{name}", summary="made up", config=Config, factory="{name}_module:{factory}",
        spec="{name}_module:spec", api_version=1,
    )
"""
CORRECT = {
    "factory": "here",
    "begin": "",
    "rewards": "np.zeros(executed, np.float32)",
    "num_steps": "self.steps",
    "final": "self.observe()",
    "camera": "front",
    "picture": "np.zeros((8, 6, 3), np.uint8)",
    "state": "np.zeros(2, np.float32)",
    "instruction": "do a",
    "events": "[self.event]",
}


@pytest.fixture
def last_finding(fake_distribution):
    """Install an environment with something wrong in it, and what playing it finds."""

    def examine(name, changes):
        source = PLAYABLE.format(name=name, **(CORRECT | changes))
        entry_points = {"vlactl.environments": {name: f"{name}_module:PLUGIN"}}
        fake_distribution(f"{name}-dist", entry_points, {f"{name}_module.py": source})
        *before, last = conformance.check("environment", name)
        assert all(finding.level == "ok" for finding in before)
        return last

    return examine


@pytest.mark.parametrize("factory", ["here", "pool"])
def test_an_environment_that_keeps_the_contract_plays(last_finding, factory):
    finding = last_finding(f"plays{factory}", {"factory": factory})
    assert (finding.level, finding.subject) == ("ok", "episode")
    assert finding.detail == "6 steps, played twice with the same results"


@pytest.mark.parametrize(
    ("number", "changes", "level", "expected"),
    [
        (
            0,
            {"factory": "pool", "begin": "raise RuntimeError('no scene')"},
            "FAIL",
            "begin: RuntimeError: no scene",
        ),
        (
            1,
            {"picture": "np.zeros((4, 4, 3), np.uint8)"},
            "FAIL",
            'begin: picture "front" is uint8 [4, 4, 3], not uint8 [8, 6, 3]; advance: ',
        ),
        (
            2,
            {"state": "np.array([0, self.plays], np.float32)"},
            "FAIL",
            "other states when the same episode is played again",
        ),
        (
            3,
            {"rewards": "np.zeros(2)", "num_steps": "7"},
            "FAIL",
            "advance: rewards is float64 [2], not float32 [4]; "
            "advance: rewards is float64 [2], not float32 [2]; "
            "outcome: num_steps is 7, rewards came for 4",
        ),
        (4, {"camera": "back"}, "FAIL", "begin: pictures of ['back'], asked for ['front']"),
        (
            5,
            {"instruction": "do b"},
            "FAIL",
            'begin: instruction "do b", that of the task is "do a"',
        ),
        (6, {"events": "[]"}, "FAIL", "begin: no event from wait"),
        (
            7,
            {"begin": "raise EnvironmentNotReadyError('no driver', hint='get it')"},
            "warn",
            "not checked: no driver",
        ),
        (
            9,
            {"final": "None"},
            "FAIL",
            "advance: an observation is missing, as EnvContext.final_observations asks",
        ),
        (8, {"factory": "gone"}, "FAIL", '"play8" cannot be loaded from play8_module:gone'),
    ],
)
def test_what_playing_finds(last_finding, number, changes, level, expected):
    finding = last_finding(f"play{number}", changes)
    assert finding.level == level
    assert finding.detail.startswith(expected)


def test_weights_of_four_bits_are_no_mistake(fake_distribution):
    source = """
        from vlactl.api.plugins import Footprint, ModelConfig, ModelPlugin

        class Config(ModelConfig):
            name: str = "small"

        def footprint(config, context):
            return Footprint(
                parameters=2, trainable=1, bytes_per_parameter=0.5, activation_bytes=0
            )

        PLUGIN = ModelPlugin(
            name="small", summary="made up", config=Config, factory="nowhere:make",
            footprint="small_module:footprint", api_version=1,
        )
    """
    entry_points = {"vlactl.models": {"small": "small_module:PLUGIN"}}
    fake_distribution("small-dist", entry_points, {"small_module.py": source})
    found = conformance.check("model", "small")
    assert not conformance.failed(found), found
