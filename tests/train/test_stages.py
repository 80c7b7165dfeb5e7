"""A run in stages: deaths inside and between them, early stopping, a full disk, the reference's numbers."""
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest

TINY = """--image-size 32 --strides 16 32 --stem-filters 8 --stem-groups 2 --backbone-filters 8 8 8 8
 --backbone-groups 4 --backbone-blocks 1 1 1 1 --pyramid-channels 16 --pyramid-groups 4
 --tower-depth 1 --tower-channels 16 --tower-groups 4
 --level-areas 256 --batch-size 2 --gradient-accumulation-steps 3 --min-height 20 --max-height 30 --max-people 1
 --max-dogs 0 --max-balls 0 --empty-share 0 --min-visible 0.9 --assign-nearest-if-empty --scenes 9
 --precision float32""".split()
# the first stage cannot get better, for its rate is 0: patience ends it after three of nine epochs
STAGES = ["--stage", "name=still images=0:4 epochs=9 learning_rate=0 min_learning_rate=0",
          "--stage", "images=4:8 epochs=2 learning_rate=0.01",
          "--stage", "name=all epochs=1 learning_rate=1e-3 constant=yes heads_lr_multiplier=10 freeze=fpn"]
PATIENT = ["--early-stopping-patience", "2", "--monitor", "val_loss", "--ema-momentum", "0.5"]
BEGIN = [*TINY, *STAGES, *PATIENT, "--scenes", "11", "--gradient-accumulation-steps", "4"]
STEPS = 3 * 2 + 2 * 2 + 5 # 11 images are five batches of two
UNTIMED = "images_per_second", "memory_mb"

class Killed(BaseException):
    "No handler catches this one, as none catches a kill."

class Lives:
    "Runs that live and die in one process, one after the other, with one network built and traced once."
    def __init__(self):
        from fcos_lite.evaluate import evaluator
        from fcos_lite.train import distributed, stages, trainer
        from fcos_lite.train.checkpoint import model_state
        lives, build, start = self, trainer.build_model, stages.start_stage
        self.steps, self.ends, self.death, self.seconds, self.model = 0, {}, {}, 0, None

        class Checkpoint(distributed.SharedCheckpoint):
            "Dies before a step, or fills the disk before it; keeps what a stage ends with."
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.every_seconds, self.epoch_seconds = lives.seconds, min(10, lives.seconds)
            def fit(self, *args, **kwargs):
                super().fit(*args, **kwargs)
                lives.ends[self.stage] = model_state(self.model)
            def on_train_batch_begin(self, batch, logs=None):
                lives.steps += 1
                if lives.death.get("step") == self.step: raise Killed()
                if lives.death.get("full") == self.step: lives.limit_files(20_000)

        def start_stage(model, plan, by_clock):
            if lives.death.get("stage") == plan.index: raise Killed()
            start(model, plan, by_clock)
            model.run_eagerly = True # saves more time than it costs

        def build_model(*args):
            if not lives.model: lives.model = build(*args), None
            model, values = lives.model
            if values is None: lives.model = model, [np.array(variable) for variable in model.variables]
            for variable, value in zip(model.variables, lives.model[1]): variable.assign(value)
            return model

        distributed.SharedCheckpoint, stages.start_stage, trainer.build_model = Checkpoint, start_stage, build_model
        evaluator.evaluate = self.no_evaluation

    def no_evaluation(self, model, examples, out):
        metrics = dict.fromkeys(("AP", "AP50", "AP75", "source_map75", "images"), 0)
        (out / "evaluation.json").write_text(json.dumps(metrics))
        return metrics

    def limit_files(self, size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def live(self, argv, seconds=0, **death): # None, Killed, or an InputError's words
        from fcos_lite.config import InputError
        from fcos_lite.train.__main__ import main
        self.steps, self.ends, self.death, self.seconds = 0, {}, death, seconds
        try: main(argv)
        except Killed: return "Killed"
        except InputError as error: return str(error)
        finally: self.limit_files(resource.RLIM_INFINITY)

def lives(home):
    "Print, as JSON, what was seen of a run left in peace and of one that died often."
    from fcos_lite.train.checkpoint import LAST, read_checkpoint
    from fcos_lite.train.run import read_metrics
    seen, lives = {}, Lives()
    def rows(folder):
        return [{name: value for name, value in row.items() if name not in UNTIMED} for row in read_metrics(folder)]
    def files(folder): return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    peace, killed = home / "peace", home / "killed"
    assert lives.live([*BEGIN, "--out", str(peace)]) is None
    seen["steps"], ends = lives.steps, lives.ends
    seen["rows"] = rows(peace)
    seen["updates"] = [int(ends[stage]["optimizer/0/iteration"]) for stage in range(3)]
    seen["files"] = sorted(path.name for path in peace.iterdir())
    names = [name for name in ends[0] if name.startswith("model/") and not name.endswith("/state")]
    def moved(before, after): return sum(not np.array_equal(before[name], after[name]) for name in names)
    seen["moved"] = [moved(ends[0], ends[1]), moved(ends[1], ends[2])]
    seen["of"] = len(names)

    deaths = [dict(step=5), dict(stage=1), dict(step=7, seconds=1e9), dict(step=9), dict(full=13, seconds=1e9), {}]
    seen["deaths"], seen["lived"], argv = [], [], [*BEGIN, "--out", str(killed)]
    for death in deaths:
        seen["deaths"].append(lives.live(argv, **death))
        seen["lived"].append(lives.steps)
        argv = ["--resume", str(killed)]
    (ours, arrays), (theirs, their_arrays) = read_checkpoint(killed / LAST), read_checkpoint(peace / LAST)
    seen["different"] = [name for name in their_arrays if not np.array_equal(arrays[name], their_arrays[name])]
    seen["different"] += [name for name in theirs if name != "metrics" and ours[name] != theirs[name]]
    seen["arrays"], seen["same rows"] = len(their_arrays), rows(killed) == rows(peace)

    config, before = json.loads((killed / "config.json").read_text()), files(killed)
    seen["refused"] = {}
    changes = {"another model": {"model": {"class_prior": 0.1}}, "other images": {"command": {"run": {"seed": 1}}},
               "other stages": {"recipe": {"stages": []}}}
    for name, change in changes.items():
        changed = {part: fields | change.get(part, {}) for part, fields in config.items()}
        (killed / "config.json").write_text(json.dumps(changed))
        seen["refused"][name] = lives.live(["--resume", str(killed)])
    (killed / "config.json").write_bytes(before["config.json"])
    (killed / LAST).write_bytes(before[LAST][:-100])
    seen["refused"]["cut off"] = lives.live(["--resume", str(killed)])
    (killed / LAST).write_bytes(before[LAST])
    after = files(killed)
    seen["touched"] = [name for name in before if name != "log.txt" and before[name] != after.get(name)]
    seen["touched"] += [name for name in after if name not in before]
    print(json.dumps(seen))

@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    "What `lives` saw."
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, __file__, str(tmp_path_factory.mktemp("lives"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

def test_the_reference_s_curriculum_number_for_number():
    from fcos_lite.config import REFERENCE_RECIPE
    from fcos_lite.train.stages import plan_stages, reference_stages
    from fcos_lite.train.trainer import schedule_for
    plans = plan_stages(REFERENCE_RECIPE.change(stages=reference_stages(38_800)), 38_800)
    chunks = [(0, 10_000), (10_000, 20_000), (20_000, 30_000), (30_000, 38_800), (0, 38_800)]
    assert [(plan.images.start, plan.images.stop) for plan in plans] == chunks
    assert [plan.recipe.epochs for plan in plans] == [30] * 4 + [10]
    assert [plan.steps for plan in plans] == [75_000] * 3 + [66_000, 97_000] # of four images
    for plan in plans[:4]:
        schedule = schedule_for(plan.recipe, plan.steps)
        assert (schedule.learning_rate, schedule.min_learning_rate, schedule.start_rate) == (5e-5, 2.5e-7, 2.5e-7)
        assert schedule.warmup_steps == plan.steps // 20 # shorter than 20 warm-ups of 5,000
        assert (plan.recipe.optimizer.fpn_lr_multiplier, plan.recipe.optimizer.heads_lr_multiplier) == (1, 1)
    last = plans[4].recipe.optimizer
    rates = np.array(schedule_for(plans[4].recipe, plans[4].steps)(np.arange(0, 97_000, 1000)))
    np.testing.assert_allclose(rates, 1e-6, rtol=1e-6)
    assert last.fpn_lr_multiplier == 1 and last.heads_lr_multiplier * 1e-6 == pytest.approx(1e-5, rel=1e-12)
    for plan in plans:
        values = plan.recipe.flat()
        assert (values["batch_size"], values["gradient_accumulation_steps"], values["weight_decay"]) == (4, 8, 5e-3)
        assert (values["clip_norm"], values["early_stopping_patience"]) == (10.0, 7)

def test_the_run_goes_through_its_stages(seen):
    rows = seen["rows"]
    assert seen["steps"] == STEPS and [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 15]
    assert [int(row["stage"]) for row in rows] == [1, 1, 1, 2, 2, 3]
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    # in micro-batches: each stage has its own optimizer, and at its end, planned or not, one step for those that wait
    assert seen["updates"] == [8, 4, 8]
    rates = [row["learning_rate"] for row in rows]
    assert rates[:3] == [0, 0, 0] and rates[5] == 1e-3 and 0 < rates[4] < rates[3] < 0.01
    assert rows[5]["learning_rate_heads"] == pytest.approx(1e-2) and rows[5]["learning_rate_fpn"] == 1e-3
    assert seen["moved"][0] > 0.9 * seen["of"] and 0 < seen["moved"][1] < 0.4 * seen["of"] # at the end only the heads

def test_patience_ends_a_stage_and_the_next_one_goes_on(seen):
    losses = [row["val_loss"] for row in seen["rows"]]
    assert losses[0] == losses[1] == losses[2] != losses[4] # in between only two of four micro-batches wait

def test_each_stage_is_measured_on_the_chunks_before_it(seen):
    measured = [("AP_stage1" in row, "AP_stage2" in row) for row in seen["rows"]]
    assert measured == [(True, False)] * 3 + [(True, True)] * 3

def test_the_ema_is_measured_beside_the_raw_weights(seen):
    assert all({"val_loss_ema", "AP_ema"} <= row.keys() for row in seen["rows"])
    assert {"best.weights.h5", "last.weights.h5", "last-ema.weights.h5"} <= set(seen["files"])
    pairs = [(row["val_loss"], row["val_loss_ema"]) for row in seen["rows"]]
    assert all(raw == ema for raw, ema in pairs[:3]) and all(raw != ema for raw, ema in pairs[4:])

def test_deaths_inside_stages_and_between_them_change_nothing(seen):
    assert seen["deaths"][:4] == ["Killed"] * 4 and seen["deaths"][5] is None
    assert seen["lived"] == [6, 1, 2, 4, 6, 5], "the steps of each life, the one before which it died among them"
    assert seen["arrays"] > 150 and not seen["different"] and seen["same rows"]

def test_a_full_disk_is_a_sentence_and_the_run_goes_on(seen):
    message = seen["deaths"][4]
    assert ".weights.h5: cannot be written" in message and "make room" in message and "--resume" in message

def test_another_run_s_checkpoint_is_refused_and_nothing_is_touched(seen):
    refused = seen["refused"]
    assert "model.class_prior is 0.05 there and 0.1 here" in refused["another model"]
    assert "data.checksum is" in refused["other images"] and "recipe.stages is" in refused["other stages"]
    assert "checkpoint.npz: damaged or cut off" in refused["cut off"]
    assert not seen["touched"]

@pytest.mark.slow
def test_a_real_kill_between_stages_and_inside_one(tmp_path):
    "The command, killed by the system at a line of its log; resumed by the command."
    from fcos_lite.train.checkpoint import LAST, read_checkpoint
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    def command(argv, until=None):
        with subprocess.Popen([sys.executable, "-u", "-m", "fcos_lite.train", *argv], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True, env=environment) as process:
            for line in process.stdout:
                if not until or until not in line: continue
                process.send_signal(signal.SIGKILL)
                break
        assert process.returncode == (-signal.SIGKILL if until else 0)
    begin = [*BEGIN, "--checkpoint-seconds", "0"]
    command([*begin, "--out", str(tmp_path / "peace")])
    command([*begin, "--out", str(tmp_path / "killed")], "this stage ends")
    command(["--resume", str(tmp_path / "killed")], "stage 2, epoch 4")
    command(["--resume", str(tmp_path / "killed")])
    (ours, arrays), (theirs, their_arrays) = (read_checkpoint(tmp_path / name / LAST) for name in ("killed", "peace"))
    assert ours["counters"] == theirs["counters"] and ours["step"] == STEPS
    for name in their_arrays: np.testing.assert_array_equal(arrays[name], their_arrays[name], err_msg=name)

if __name__ == "__main__": lives(Path(sys.argv[1]))
