"""launch/train.sbatch, really submitted: a job trains until its run is complete, whatever stops it in between."""

import subprocess
from pathlib import Path

import pytest

from tests.harness import (
    REPOSITORY,
    assert_same_state,
    checkpoint,
    largest_difference,
    logged,
    read_verified,
    tensors_of,
)
from tests.slurm.cluster import PATIENCE, Cluster, Job, Run

CHAIN = 3
SHORTEST = 400  # steps of the uninterrupted run, with which all others are compared


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm runs")  # the space is part of the test


@pytest.fixture(scope="module")
def chain(cluster: Cluster, runs: Path, dataset: Path) -> Run:
    """A job whose time limit comes three times before its run is complete; it ends with a multiple of 50 steps."""
    run = Run.make(runs, dataset, "chain")
    # SLURM looks at limits twice a minute: a warning this early comes after half a minute, the limit never.
    job = cluster.train(run, "--time=1", "--signal=B:USR1@40")
    job.wait_until(f"{CHAIN} restarts", lambda: len(run.events("stopped")) == CHAIN, 2 * PATIENCE)
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    run.end_at(max(SHORTEST, run.events("stopped")[-1]["step"] // 50 * 50 + 100))
    assert job.wait() == "COMPLETED", job.output
    assert job.restarts == CHAIN
    return run


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, runs: Path, dataset: Path, chain: Run) -> Run:
    """The same run without SLURM and in one go: by hand on two machines."""
    run = Run.make(runs, dataset, "uninterrupted")
    run.end_at(chain.events("finished")[0]["step"])
    machines = [
        cluster.on_node(
            node,
            *("launch/local.sh", "--config", str(run.config)),
            DDPM_NODES="2",
            DDPM_NODE_RANK=str(rank),
            DDPM_HEAD="n1",
        )
        for rank, node in enumerate(["n1", "n2"])
    ]
    try:
        outputs = [machine.communicate(timeout=PATIENCE)[0] for machine in machines]
    except subprocess.TimeoutExpired:
        for machine in machines:
            machine.terminate()
        raise AssertionError([machine.communicate()[0] for machine in machines]) from None
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    for rank, output in enumerate(outputs):
        assert f"node {rank} of 2: n{rank + 1}, 1 of 2 processes, gloo on eth0" in output
    return run


def assert_trained_like(run: Run, uninterrupted: Run) -> None:
    """Same weights, moments, averages and losses to the last bit, on the same number of processes; nothing twice."""
    step = run.events("finished")[-1]["step"]
    assert_same_state(run.folder, uninterrupted.folder, step)
    losses = logged(uninterrupted.folder)
    assert logged(run.folder) == {at: loss for at, loss in losses.items() if at <= step}
    shown = run.tensorboard_steps()
    assert shown == sorted(set(shown))
    assert shown == sorted(logged(run.folder))


def test_two_machines_train_by_hand_through_accelerate(uninterrupted: Run) -> None:
    (started,) = uninterrupted.events("started")
    assert (started["world_size"], started["nodes"]) == (2, 2)
    assert (uninterrupted.folder / "DONE").exists()


def test_a_job_goes_on_after_each_time_limit_and_changes_no_bit(chain: Run, uninterrupted: Run) -> None:
    """Warned three times, saved, requeued; the final state is that of the run that nobody stopped."""
    starts, stops = chain.events("started"), chain.events("stopped")
    assert [start["step"] for start in starts] == [0, *(stop["step"] for stop in stops)]
    assert [start["attempt"].split(".")[1] for start in starts] == ["0", "1", "2", "3"]
    assert {(start["world_size"], start["nodes"]) for start in starts} == {(2, 2)}
    assert_trained_like(chain, uninterrupted)
    log = chain.folder.with_suffix(".log").read_text()
    assert log.count("saved and stopped: requeued") == CHAIN
    for rank in (0, 1):  # of srun --label, the first of each attempt
        assert log.count(f"{rank}: node {rank} of 2: n{rank + 1}, 1 of 2 processes") == CHAIN + 1


def test_a_finished_run_is_not_trained_again(cluster: Cluster, chain: Run) -> None:
    job = cluster.train(chain)
    assert job.wait() == "COMPLETED"
    assert "finished already" in job.output
    assert job.restarts == 0
    assert len(chain.events("started")) == CHAIN + 1


def without_warning(folder: Path) -> Path:
    """The job's script as it would be without `--signal`: SLURM then preempts with TERM, to the trainers alone."""
    lines = (REPOSITORY / "launch" / "train.sbatch").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("#SBATCH --signal=")]
    assert len(kept) == len(lines) - 1
    script = folder / "without_warning.sbatch"
    script.write_text("".join(kept))
    return script


def preempt(cluster: Cluster, runs: Path) -> Job:
    """Submit a job for all nodes that goes before the others."""
    everything = ("--partition=urgent", "--nodes=3", "--exclusive", "--time=1", "--wrap=sleep 1")
    return cluster.sbatch(*everything, log=runs / "urgent.log")


@pytest.mark.parametrize("warned", [True, False])
def test_preempted_it_makes_way_and_comes_back(
    cluster: Cluster, runs: Path, dataset: Path, uninterrupted: Run, warned: bool
) -> None:
    """With USR1 to the script, as SLURM can be set to; or as it comes, with TERM to the trainers alone."""
    run = Run.make(runs, dataset, f"preempted_{warned}")
    options = {} if warned else {"script": without_warning(runs)}
    job = cluster.train(run, **options)
    job.wait_until("training", lambda: run.step >= 10)
    urgent = preempt(cluster, runs)
    job.wait_until("stopped", lambda: len(run.events("stopped")) == 1)
    (stopped,) = run.events("stopped")
    run.end_at(stopped["step"] // 50 * 50 + 50)
    assert urgent.wait() == "COMPLETED"
    assert job.wait() == "COMPLETED", job.output
    assert job.restarts == 1
    assert job.output.count("USR1: the time limit is near, or another job") == (1 if warned else 0)
    assert job.output.count("saved and stopped: requeued") == 1
    assert [start["step"] for start in run.events("started")] == [0, stopped["step"]]
    assert_trained_like(run, uninterrupted)


def test_preempted_before_it_could_train_it_comes_back(cluster: Cluster, runs: Path, dataset: Path) -> None:
    """TERM ends trainers that have not begun: no state was saved, none lost, and it is no failure."""
    run = Run.make(runs, dataset, "preempted_early")
    run.end_at(20)
    job = cluster.train(run, script=without_warning(runs))
    job.wait_until("trainers starting", lambda: "node 0 of 2" in job.output)
    assert preempt(cluster, runs).wait() == "COMPLETED"
    assert job.wait() == "COMPLETED", job.output
    assert job.restarts == 1
    assert "preempted: requeued" in job.output
    assert [start["step"] for start in run.events("started")] == [0]


def test_where_slurm_refuses_a_requeue_the_state_is_saved_and_the_user_told(
    cluster: Cluster, runs: Path, dataset: Path
) -> None:
    run = Run.make(runs, dataset, "no_requeue")
    job = cluster.train(run, "--no-requeue", nodes=1)
    job.wait_until("training", lambda: run.step >= 10)
    job.signal_batch("USR1")
    assert job.wait() == "FAILED", job.output
    assert "scontrol requeue: refused; submit again to go on, or use --chain" in job.output
    (stopped,) = run.events("stopped")
    assert checkpoint(run.folder, stopped["step"]).exists()


def test_requeues_by_others_are_bounded_too(cluster: Cluster, runs: Path, dataset: Path) -> None:
    """SLURM itself requeues, for dead nodes and on demand; a job that comes back too often ends before it trains."""
    run = Run.make(runs, dataset, "requeued_by_others")
    job = cluster.train(run, nodes=1, DDPM_MAX_RESTARTS="0")
    job.wait_until("training", lambda: run.step >= 10)
    cluster.run("scontrol", "requeue", job.number)
    assert job.wait() == "FAILED", job.output
    assert job.restarts == 1
    assert "this is restart 1, DDPM_MAX_RESTARTS = 0; submit again to go on" in job.output
    assert len(run.events("started")) == 1


def test_a_trainer_that_fails_is_started_again_within_the_job(
    cluster: Cluster, runs: Path, dataset: Path, uninterrupted: Run
) -> None:
    """One is killed on n2: both nodes' launchers start their trainers again, and SLURM sees nothing of it."""
    run = Run.make(runs, dataset, "elastic")
    job = cluster.train(run, DDPM_ELASTIC_RESTARTS="1")
    job.wait_until("a checkpoint and steps behind it", lambda: run.step >= 70)
    run.end_at(200)
    launcher = cluster.lab("enter", "n2", "pgrep", "--oldest", "--full", "launch/launcher.py").strip()
    (trainer,) = cluster.lab("enter", "n2", "pgrep", "--parent", launcher).split()
    cluster.lab("enter", "n2", "kill", "-9", trainer)
    assert job.wait() == "COMPLETED", job.output
    assert job.restarts == 0
    first, second = run.events("started")
    assert first["attempt"] == second["attempt"]
    assert (second["world_size"], second["step"] % 50, second["step"] > 0) == (2, 0, True)
    assert_trained_like(run, uninterrupted)


def test_a_dead_node_is_replaced_and_nothing_is_lost(
    cluster: Cluster, runs: Path, dataset: Path, uninterrupted: Run
) -> None:
    """n2 crashes in training; what was saved last is where the run goes on, on n1 and the spare n3."""
    run = Run.make(runs, dataset, "crashed")
    job = cluster.train(run)
    job.wait_until("a checkpoint and steps behind it", lambda: run.step >= 70)
    assert job.field("NodeList") == "n[1-2]"
    try:
        cluster.lab("crash", "n2")
        run.end_at(200)
        assert job.wait() == "COMPLETED", job.output
        assert job.restarts == 1
        assert job.field("NodeList") == "n[1,3]"
        first, second = run.events("started")
        assert (first["step"], second["step"] % 50) == (0, 0)
        saved = [event["step"] for event in run.events("checkpoint") if event["time"] < second["time"]]
        assert second["step"] == max(saved)
        assert second["lost_steps"] >= 0
        assert_trained_like(run, uninterrupted)
    finally:
        cluster.lab("boot", "n2")
        job.wait_until("n2 back", cluster.idle)


def test_a_node_that_dies_before_slurm_knows_is_no_failure(cluster: Cluster, runs: Path, dataset: Path) -> None:
    """All processes of n2 end, SLURM's with the trainer's; its peer sees at once that it is gone, and fails."""
    run = Run.make(runs, dataset, "lost")
    job = cluster.train(run)
    job.wait_until("training", lambda: run.step >= 10)
    try:
        cluster.lab("enter", "n2", "bash", "-c", "kill -9 -1", check=False)
        run.end_at(100)
        assert job.wait() == "COMPLETED", job.output
        assert job.restarts == 1
        assert job.field("NodeList") == "n[1,3]"
        assert len(run.events("started")) == 2
    finally:
        cluster.lab("crash", "n2")
        cluster.lab("boot", "n2")
        job.wait_until("n2 back", cluster.idle)


def test_a_node_that_srun_cannot_reach_is_no_failure(cluster: Cluster, runs: Path, dataset: Path) -> None:
    """n1, where the script runs, finds no way to n2, of which the controller knows nothing; later there is one."""
    run = Run.make(runs, dataset, "unreachable")
    run.end_at(20)
    address = cluster.lab("enter", "n1", "getent", "hosts", "n2").split()[0]
    cluster.lab("enter", "n1", "ip", "route", "add", "blackhole", address)
    try:
        job = cluster.train(run)
        job.wait_until("requeued", lambda: "srun could not reach a node: requeued" in job.output)
    finally:
        cluster.lab("enter", "n1", "ip", "route", "del", "blackhole", address)
    assert job.wait() == "COMPLETED", job.output
    assert job.restarts == 1
    assert [start["step"] for start in run.events("started")] == [0]


def test_cancelled_it_saves_and_stays_ended_and_goes_on_with_fewer_nodes(
    cluster: Cluster, runs: Path, dataset: Path, uninterrupted: Run
) -> None:
    run = Run.make(runs, dataset, "cancelled")
    job = cluster.train(run)
    job.wait_until("training", lambda: run.step >= 20)
    job.cancel()
    assert job.wait() == "CANCELLED"
    job.wait_until("nodes free", cluster.idle)  # the script is over, too
    assert job.restarts == 0
    assert job.state == "CANCELLED"
    (stopped,) = run.events("stopped")
    assert read_verified(checkpoint(run.folder, stopped["step"]))[1]["step"] == stopped["step"]

    run.end_at(stopped["step"] // 50 * 50 + 50)
    again = cluster.train(run, nodes=1)
    assert again.wait() == "COMPLETED", again.output
    assert [(start["step"], start["world_size"]) for start in run.events("started")] == [(0, 2), (stopped["step"], 1)]
    losses, whole = logged(run.folder), logged(uninterrupted.folder)
    assert sorted(losses) == [step for step in sorted(whole) if step <= max(losses)]
    assert losses == {step: pytest.approx(whole[step], rel=0.2) for step in losses}  # dropout's masks are others
    assert largest_difference(tensors_of(run.folder, max(losses)), tensors_of(uninterrupted.folder, max(losses))) < 0.1


def test_a_failing_job_is_not_requeued_and_disturbs_nobody(cluster: Cluster, runs: Path, dataset: Path) -> None:
    """It fails because another job trains in the run's folder; that one, requeued at most once, is stopped twice."""
    run = Run.make(runs, dataset, "two_jobs")
    first = cluster.train(run, nodes=1, DDPM_MAX_RESTARTS="1")
    first.wait_until("training", lambda: run.step >= 10)
    second = cluster.sbatch(
        "--nodes=1", "--time=10", "launch/train.sbatch", "--config", str(run.config), log=runs / "second.log"
    )
    assert second.wait() == "FAILED", second.output
    assert second.restarts == 0
    assert f"run_dir = {run.folder}: another job trains there (process" in second.output
    assert "failed; not requeued" in second.output
    for stops in (1, 2):
        first.signal_batch("USR1")
        first.wait_until("stopped", lambda stops=stops: len(run.events("stopped")) == stops)
        if stops == 1:
            first.wait_until("training again", lambda: len(run.events("started")) == 2)
    assert first.wait() == "FAILED"
    assert first.restarts == 1
    assert "DDPM_MAX_RESTARTS = 1 is reached; submit again to go on" in first.output
