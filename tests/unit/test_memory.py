"""Memory of plans: what each kind of rank holds in each phase, what moves, and what would help."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from vlactl.config.compose import compose
from vlactl.config.run import RunConfig
from vlactl.launch import doctor
from vlactl.launch.hardware import GIB, Gpu, Hardware
from vlactl.launch.plan import Plan, make_plan, plan_evaluation

LIGHT = ("env.backend=fast", "env.num_envs=8", "env.slots_per_process=4", "model.path=.")


def libero(*overrides: str, preset: str = "libero_10_grpo") -> RunConfig:
    return compose(preset, [*LIGHT, *overrides]).config


def machine(gpus: int, *, each: float = 80, ram: int = 2000) -> Hardware:
    gpu = Gpu(index=0, name="x", memory_bytes=round(each * GIB))
    return Hardware(cores=16, ram_bytes=ram * GIB, gpus=(gpu,) * gpus)


def planned(config: RunConfig, hardware: Hardware, nodes: int = 1) -> Plan:
    return make_plan(config, hardware, gpus=len(hardware.gpus) or None, nodes=nodes)


def parts(plan: Plan, phase: str, kind: str = "") -> dict[str, float]:
    """GiB by name on ranks of a kind in a phase, and their "total"."""
    line = next(line for line in plan.memory if line.startswith(kind))
    total, terms = re.search(rf"{phase} ([\d.]+) \((.*?)\)", line).groups()
    named = {name: float(size) for name, size in re.findall(r"([a-zA-Z ]+?) ([\d.]+)", terms)}
    return {name.strip(): size for name, size in named.items()} | {"total": float(total)}


def test_actors_share_float32_weights_gradients_and_optimizer():
    one, eight = (planned(libero(), machine(n)) for n in (1, 8))
    alone, shared = (parts(plan, "update") for plan in (one, eight))
    assert (alone["weights"], alone["gradients"], alone["optimizer"]) == (28.1, 27.9, 55.9)
    assert (shared["weights"], shared["gradients"], shared["optimizer"]) == (3.5, 3.5, 7.0)
    assert (shared["activations"] > 5, shared["whole units"] > 3) == (True, True)
    # On one rank the optimizer's step needs more than the passes before it: one more tensor per
    # parameter. 2 H100, 7.5 B parameters: 70.1 GiB measured where 14 + 14 + 28 + 14 are counted.
    assert alone["optimizer step"] == 27.9
    assert one.sharded
    assert eight.sharded


def test_an_actor_acts_with_a_copy_while_episodes_are_played():
    plan = planned(libero(), machine(8))
    assert parts(plan, "rollout")["copy that acts"] == 14.0
    assert "copy that acts" not in parts(plan, "update")
    assert "gradients" not in parts(plan, "rollout")


@pytest.mark.parametrize("change", ["lora.rank=32", "train.sharding=false"])
def test_whole_weights_need_no_copy(change):
    plan = planned(libero(change, "optim.micro_batch_size=1"), machine(2))
    rollout = parts(plan, "rollout")
    assert "copy that acts" not in rollout
    assert rollout["weights"] == pytest.approx(14.1, abs=0.2)
    assert not plan.sharded


def test_without_sharding_the_optimizer_has_no_float32_weights_and_that_is_told():
    plan = planned(libero("train.sharding=false"), machine(2))
    assert parts(plan, "update")["optimizer"] == 27.9
    assert any("works in bfloat16" in note for note in plan.notes)


def test_ranks_of_a_single_role_hold_nothing_else():
    roles = ["placement.env=0", "placement.rollout=1", "placement.actor=2-3"]
    plan = planned(libero(*roles), machine(4))
    for phase in ("rollout", "update"):
        assert parts(plan, phase, "env 0").keys() == {"simulators", "CUDA", "total"}
        assert parts(plan, phase, "rollout 1").keys() == {"weights", "CUDA", "total"}
    assert parts(plan, "rollout", "actor 2-3").keys() == {"weights", "optimizer", "CUDA", "total"}
    assert plan.offload == ()


def test_eight_bit_moments_take_a_quarter_of_the_memory():
    usual, small = (
        parts(planned(libero(f"optim.optimizer={name}"), machine(8)), "update")["optimizer"]
        for name in ("adamw", "adamw8bit")
    )
    assert usual / small == pytest.approx(4, rel=0.05)


def test_a_reference_policy_is_a_second_copy_unless_there_are_adapters():
    kl = "algorithm.kl_coef=0.1"
    assert "reference" not in parts(planned(libero(), machine(8)), "update")
    assert parts(planned(libero(kl), machine(8)), "update")["reference"] == 3.5
    adapted = planned(libero(kl, preset="libero_10_grpo_lora"), machine(8))
    assert "reference" not in parts(adapted, "update")


def test_offload_moves_only_what_makes_a_rollout_fit():
    # Rollouts of 8 actors take 3.5 + 7.0 + 14.0 GiB, simulators and CUDA.
    need = parts(planned(libero(), machine(8)), "rollout")["total"]
    assert planned(libero(), machine(8, each=need + 0.1)).offload == ()
    assert planned(libero(), machine(8, each=need - 1)).offload == ("optimizer",)
    # The weights are there until the copy that acts is full: moving them would not help.
    assert planned(libero(), machine(8, each=need - 8)).offload == ("optimizer",)
    smaller = parts(planned(libero(), machine(8, each=need - 8)), "rollout")
    assert "optimizer" not in smaller
    assert smaller["total"] == pytest.approx(need - 7.0, abs=0.2)


def test_offload_can_be_wished_for():
    config, hardware = libero("train.offload=always"), machine(8)
    plan = planned(config, hardware)
    assert plan.offload == ("optimizer", "weights")
    assert "offloaded 84" in plan.memory[-1]  # 8 x 10.5 GiB
    assert planned(libero("train.offload=never"), machine(8, each=10)).offload == ()
    adapted = planned(libero("train.offload=always", "lora.rank=32"), hardware)
    assert adapted.offload == ("optimizer",)  # the weights act
    on_cpu = planned(
        compose("toy_grpo", ["train.offload=always"]).config, replace(hardware, gpus=())
    )
    assert on_cpu.offload == ()
    assert any("train.offload = always has no effect" in note for note in on_cpu.notes)


def test_pictures_go_to_files_when_the_host_is_too_small():
    # 65 536 pictures take 12 GiB, the simulators 9 and a checkpoint 84.
    plan = planned(libero("checkpoint.background=false"), machine(8, ram=40))
    assert not plan.spill
    assert "observations of a step 12.0 GiB" in plan.memory[-1]
    plan = planned(libero("checkpoint.background=false"), machine(8, ram=30))
    assert plan.spill
    assert any("pictures of a step, 12.0 GiB, go through files" in note for note in plan.notes)
    assert "observations" not in plan.memory[-1]
    assert not any("memory" in line for line in plan.blockers)


def test_doctor_asks_for_disk_where_pictures_go_to_files(tmp_path):
    config = libero("checkpoint.background=false")
    small, large = (doctor._disk(config, machine(8, ram=ram), tmp_path) for ram in (30, 40))
    needs = [
        float(re.search(r"about ([\d.]+) GiB", finding.detail)[1]) for finding in (small, large)
    ]
    assert needs[0] - needs[1] == pytest.approx(12, abs=0.1)


def test_two_steps_are_held_where_rollouts_lag_behind():
    apart = ["placement.env=0-1", "placement.rollout=0-1", "placement.actor=2-3"]
    plan = planned(libero("train.staleness=1", *apart), machine(4))
    assert "observations of a step 24.0 GiB" in plan.memory[-1]


def test_each_machine_holds_its_share():
    one, two = (planned(libero(), machine(4), nodes) for nodes in (1, 2))
    assert "observations of a step 12.0 GiB + checkpoint in the background 84" in one.memory[-1]
    assert two.memory[-1].startswith("each host: observations of a step 6.0 GiB")
    assert "checkpoint in the background 42" in two.memory[-1]
    apart = ["placement.env=0-3", "placement.rollout=4-7"]
    assert "observations of a step 12.0 GiB" in planned(libero(*apart), machine(4), 2).memory[-1]


def test_a_checkpoint_in_the_background_is_a_copy_in_host_memory():
    (blocker,) = planned(libero(), machine(8, ram=64)).blockers
    assert "checkpoint.background = false" in blocker
    assert planned(libero("checkpoint.background=false"), machine(8, ram=64)).blockers == ()


def test_ways_out_are_those_that_help():
    config = libero("checkpoint.background=false")
    (blocker,) = planned(config, machine(1)).blockers
    assert blocker.startswith("training needs about 144 of 80 GiB per rank in the update: ")
    assert "lora.rank = 32" in blocker
    assert "2 devices or lora" in blocker
    assert "micro_batch_size" not in blocker  # would save 6 of 46 GiB
    assert planned(libero("lora.rank=32"), machine(1)).blockers == ()
    assert planned(config, machine(2)).blockers == ()


def test_activations_have_their_own_ways_out():
    config = libero("train.activation_checkpointing=none", "optim.micro_batch_size=32")
    (blocker,) = planned(config, machine(8)).blockers
    size = int(re.search(r"optim.micro_batch_size = (\d+)", blocker)[1])
    assert "train.activation_checkpointing = full" in blocker
    fitting, larger = (
        libero("train.activation_checkpointing=none", f"optim.micro_batch_size={n}")
        for n in (size, 2 * size)
    )
    assert planned(fitting, machine(8)).blockers == ()
    assert planned(larger, machine(8)).blockers


def test_selective_recomputation_lies_between():
    nothing, selective, full = (
        parts(planned(libero(f"train.activation_checkpointing={mode}"), machine(8)), "update")
        for mode in ("none", "selective", "full")
    )
    assert full["activations"] < selective["activations"] < nothing["activations"]


def test_several_changes_together():
    # Two GPUs of 48 GiB: neither a smaller batch nor 8 bits alone are enough.
    (blocker,) = planned(libero("env.num_envs=2"), machine(2, each=45)).blockers
    assert "together optim.micro_batch_size = 1, optim.optimizer = adamw8bit" in blocker
    config = libero("env.num_envs=2", "optim.micro_batch_size=1", "optim.optimizer=adamw8bit")
    assert planned(config, machine(2, each=45)).blockers == ()


def test_where_nothing_helps_larger_devices_do():
    (blocker,) = planned(libero(), machine(1, each=10)).blockers
    assert blocker.endswith("a quantised preset (_qlora), more actor devices, or larger ones")


def test_little_room_is_told():
    need = parts(planned(libero("lora.rank=32"), machine(1)), "update")["total"]
    plan = planned(libero("lora.rank=32"), machine(1, each=need + 0.5))
    assert plan.blockers == ()
    assert any("memory is tight" in note for note in plan.notes)


def test_simulators_are_part_of_the_estimate():
    assert parts(planned(libero(), machine(1)), "update")["simulators"] == 3.3
    on_gpu = planned(libero(), machine(1)).memory[-1]
    assert " + 2 simulator processes 4.7 GiB = " in on_gpu
    on_cpu = planned(libero(), Hardware(cores=16, ram_bytes=512 * GIB)).memory
    assert "simulators" not in on_cpu[0]
    assert " + 2 simulator processes 8.9 GiB = " in on_cpu[-1]  # their pictures, too
    untold = planned(compose("toy_grpo").config, Hardware(cores=16, ram_bytes=64 * GIB)).memory
    assert untold[-1].endswith("of 64.0 GiB, all ranks together; simulators extra (estimate)")


def test_supervised_training_that_nobody_evaluates_has_no_simulators():
    alone = make_plan(libero(), machine(1), gpus=None, simulators=False)
    assert "simulators" not in parts(alone, "update")
    assert "simulator" not in alone.memory[-1]


def test_simulators_count_once_per_env_process():
    assert parts(planned(libero(), machine(2)), "update")["simulators"] == 1.6
    two_each = planned(libero('placement.env="0-1:0-3"'), machine(2))
    assert parts(two_each, "update")["simulators"] > 1.6
    assert "4 simulator processes" in two_each.memory[-1]


def test_simulators_that_do_not_fit_next_to_the_policy():
    config = libero(preset="libero_10_grpo_lora")
    need = parts(planned(config, machine(1)), "update")["total"]
    (blocker,) = planned(config, machine(1, each=need - 1)).blockers
    assert "lower env.num_envs, raise env.slots_per_process" in blocker


def test_simulators_that_do_not_fit_into_the_host():
    config = libero(
        *("env.backend=stock", "env.slots_per_process=none", "env.renderer=osmesa"),
        *("optim.micro_batch_size=1", "checkpoint.background=false"),
        preset="libero_10_grpo_lora",
    )
    (blocker,) = planned(config, machine(1, ram=12)).blockers
    assert blocker == (
        "training and its simulators need about 16 of 12 GiB of this machine's memory: "
        'lower env.num_envs, env.backend = "fast"'
    )


def test_evaluation_needs_weights_and_simulators():
    plan = plan_evaluation(libero(), machine(1), gpus=1, num_episodes=3)
    device, host = plan.memory
    assert device == (
        "rollout+env 0: rollout 16.3 (weights 14.0 + simulators 1.3 + CUDA 1.0) GiB of 80.0 GiB "
        "per rank (estimate)"
    )
    assert host.startswith("host: 1 simulator process 2.1 GiB of 2000.0 GiB")
    (blocker,) = plan_evaluation(libero(), machine(1, ram=1), gpus=1, num_episodes=3).blockers
    assert blocker == (
        "evaluating and its simulators need about 2 of 1 GiB of this machine's memory: "
        "lower env.num_envs"
    )
    (blocker,) = plan_evaluation(libero(), machine(1, each=9), gpus=1, num_episodes=3).blockers
    assert blocker.endswith("a quantised preset, or a larger device")


def test_ranks_on_the_cpu_share_the_host():
    config = libero("optim.micro_batch_size=1", "train.dtype=float32")
    hardware = Hardware(cores=16, ram_bytes=64 * GIB)
    (blocker,) = make_plan(config, hardware, gpus=2).blockers
    assert "of 32 GiB per rank" in blocker


def test_every_replica_is_staged_whole_for_a_checkpoint():
    """Only shards are parts: of adapters, each actor holds and copies all."""
    plans = [
        planned(libero("lora.rank=32", "optim.micro_batch_size=1"), machine(n)) for n in (1, 8)
    ]
    one, eight = (
        float(re.search(r"checkpoint in the background ([\d.]+)", plan.memory[-1])[1])
        for plan in plans
    )
    assert 1024 * eight == pytest.approx(8 * one, rel=0.1)  # GiB and MiB
