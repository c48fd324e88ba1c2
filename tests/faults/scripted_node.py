"""One machine of a job with scripted workers: `scripted_node.py RUN_DIR NODE_RANK PORT`."""

import sys
from dataclasses import replace
from pathlib import Path

from vlactl.cli.output import print_error, print_text
from vlactl.config.compose import compose
from vlactl.errors import UserError
from vlactl.launch.follow import follow
from vlactl.launch.hardware import Hardware
from vlactl.launch.network import find_cluster
from vlactl.launch.plan import make_plan
from vlactl.launch.progress import PlainProgress
from vlactl.launch.rundir import write_run
from vlactl.launch.supervise import supervise

WORKER = "scripted_worker"
NODES = 2


def run(run_dir: Path, node_rank: int, port: int, settings: list[str]) -> int:
    cluster = find_cluster(NODES, node_rank, f"127.0.0.1:{port}", "")
    if not cluster.is_leader:
        return follow(
            run_dir, cluster, check=lambda *_: None, note=print_text, worker_module=WORKER
        )
    config = compose("toy_grpo", ["train.max_steps=2", *settings]).config
    plan = replace(make_plan(config, Hardware(cores=2, ram_bytes=2**33), gpus=NODES), nodes=NODES)
    write_run(run_dir, config, plan)
    return supervise(
        run_dir,
        plan,
        "train",
        config=config,
        progress=PlainProgress(print_text, config.train.max_steps),
        worker_module=WORKER,
        cluster=cluster,
    )


if __name__ == "__main__":
    try:
        sys.exit(run(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
    except UserError as error:
        print_error(error.message, error.hint)
        sys.exit(error.exit_code)
