"""A run that goes through stages: the source's numbers, deaths inside them and between them, early stopping, a full disk, and what is refused."""
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest

TINY = """--image-size 32 --strides 16 32 --stem-filters 8 --stem-groups 2 --backbone-filters 8 8 8 8 --backbone-blocks 1 1 1 1 --backbone-groups 4 --pyramid-channels 16 --pyramid-groups 4
 --tower-depth 1 --tower-channels 16 --tower-groups 4 --level-areas 256 --batch-size 2 --gradient-accumulation-steps 3 --min-height 20 --max-height 30 --max-people 1 --max-dogs 0 --max-balls 0 --empty-share 0 --min-visible 0.9 --assign-nearest-if-empty --scenes 9 --precision float32""".split()
# the first stage cannot get better, for its rate is 0: patience ends it after three of nine epochs
STAGES = ["--stage", "name=still images=0:4 epochs=9 learning_rate=0 min_learning_rate=0", "--stage", "images=4:8 epochs=2 learning_rate=0.01",
          "--stage", "name=all epochs=1 learning_rate=1e-3 constant=yes heads_lr_multiplier=10 freeze=fpn"]
PATIENT = ["--early-stopping-patience", "2", "--monitor", "val_loss", "--ema-momentum", "0.5"]
BEGIN = [*TINY, *STAGES, *PATIENT, "--scenes", "11", "--gradient-accumulation-steps", "4"]
STEPS = 3 * 2 + 2 * 2 + 5       # 11 pictures are five batches of two

class Killed(BaseException):
    "No handler catches this one, as none catches a kill."

def lives(home):
    "One process in which runs live and die, one after the other; prints what was seen, as JSON."
    from fcos_lite.train import __main__ as train
    from fcos_lite.train.checkpoint import LAST, read_checkpoint, model_state
    from fcos_lite.config import InputError
    seen, now = {}, {}

    class Checkpoint(train.SharedCheckpoint):
        "Dies before a step, or fills the disk before it; keeps what a stage ends with."
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.every_seconds, self.epoch_seconds = now["seconds"], min(10, now["seconds"])
        def fit(self, *args, **kwargs):
            super().fit(*args, **kwargs)
            now["ends"][self.stage] = {name: array for name, array in model_state(self.model).items()}
        def on_train_batch_begin(self, batch, logs=None):
            now["steps"] += 1
            if now.get("step") == self.step: raise Killed()
            if now.get("full") == self.step: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def prepare(model, lesson, by_clock, prepare=train.prepare):
        if now.get("prepare") == lesson.index: raise Killed()
        prepare(model, lesson, by_clock)
        model.run_eagerly = True     # saves more time than it costs

    made = []
    def build(*args, build=train.build):   # one detector for all lives, as it was when it was new
        if not made:
            model = build(*args)
            made.extend((model, [np.array(variable) for variable in model.variables]))
        for variable, value in zip(made[0].variables, made[1]): variable.assign(value)
        return made[0]

    train.SharedCheckpoint, train.prepare, train.build, train.estimate = Checkpoint, prepare, build, lambda *args: "some time"
    train.evaluate = lambda *args: dict.fromkeys(("AP", "AP50", "AP75", "source_map75", "images"), 0)

    def life(argv, seconds=0, **death):
        "What ends it: None, Killed, or an InputError's words."
        now.clear()
        now.update(seconds=seconds, steps=0, ends={}, **death)
        try: train.main(argv)
        except Killed: return "Killed"
        except InputError as error: return str(error)
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def rows(folder): return [{name: value for name, value in row.items() if name not in ("images_per_second", "memory_mb")} for row in train.Run(folder).rows()]
    def files(folder): return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    peace, killed = home / "peace", home / "killed"
    assert life([*BEGIN, "--out", str(peace)]) is None
    seen["steps"], ends = now["steps"], now["ends"]
    seen["rows"] = rows(peace)
    seen["updates"] = [int(ends[stage]["optimizer/0/iteration"]) for stage in range(3)]
    weights = lambda stage: [array for name, array in sorted(ends[stage].items()) if name.startswith("model/") and not name.endswith("/state")]
    seen["files"] = sorted(path.name for path in peace.iterdir())
    seen["moved"] = [sum(not np.array_equal(a, b) for a, b in zip(weights(stage), weights(stage + 1))) for stage in range(2)]
    seen["of"] = len(weights(0))

    deaths = [dict(step=5), dict(prepare=1), dict(step=7, seconds=1e9), dict(step=9), dict(full=13, seconds=1e9), {}]
    seen["deaths"], seen["lived"], argv = [], [], [*BEGIN, "--out", str(killed)]
    for death in deaths:
        seen["deaths"].append(life(argv, **death))
        seen["lived"].append(now["steps"])
        argv = ["--resume", str(killed)]
    (ours, arrays), (theirs, their_arrays) = read_checkpoint(killed / LAST), read_checkpoint(peace / LAST)
    seen["different"] = [name for name in their_arrays if not np.array_equal(arrays[name], their_arrays[name])] + [name for name in theirs if name != "metrics" and ours[name] != theirs[name]]
    seen["arrays"], seen["same rows"] = len(their_arrays), rows(killed) == rows(peace)

    page, before = json.loads((killed / "config.json").read_text()), files(killed)
    seen["refused"] = {}
    for what, change in {"another network": {"network": {"tower_depth": 2}}, "other pictures": {"command": {"seed": 1}}, "other stages": {"recipe": {"stages": []}}}.items():
        (killed / "config.json").write_text(json.dumps({part: fields | change.get(part, {}) for part, fields in page.items()}))
        if "network" in change: held, made[:] = made[:], []
        seen["refused"][what] = life(["--resume", str(killed)])
        if "network" in change: made[:] = held
        (killed / "config.json").write_bytes(before["config.json"])
    (killed / LAST).write_bytes(before[LAST][:-100])
    seen["refused"]["cut off"] = life(["--resume", str(killed)])
    (killed / LAST).write_bytes(before[LAST])
    after = files(killed)
    seen["touched"] = [name for name in before if name != "log.txt" and before[name] != after.get(name)] + [name for name in after if name not in before]
    print(json.dumps(seen))

@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    "What `lives` saw."
    done = subprocess.run([sys.executable, __file__, str(tmp_path_factory.mktemp("lives"))], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

def test_the_source_s_curriculum_number_for_number():
    from fcos_lite.config import REFERENCE_RECIPE
    from fcos_lite.train.stages import plan_stages, reference_stages
    from fcos_lite.train.trainer import schedule_for
    lessons = plan_stages(REFERENCE_RECIPE.change(stages=reference_stages(38_800)), 38_800)
    assert [(lesson.pictures.start, lesson.pictures.stop) for lesson in lessons] == [(0, 10_000), (10_000, 20_000), (20_000, 30_000), (30_000, 38_800), (0, 38_800)]
    assert [lesson.recipe.epochs for lesson in lessons] == [30] * 4 + [10]
    assert [lesson.steps for lesson in lessons] == [75_000] * 3 + [66_000, 97_000]          # of four pictures
    for lesson in lessons[:4]:
        schedule = schedule_for(lesson.recipe, lesson.steps)
        assert (schedule.learning_rate, schedule.min_learning_rate, schedule.start_rate) == (5e-5, 2.5e-7, 2.5e-7)
        assert schedule.warmup_steps == lesson.steps // 20                                  # shorter than 20 warm-ups of 5,000
        assert (lesson.recipe.optimizer.fpn_lr_multiplier, lesson.recipe.optimizer.heads_lr_multiplier) == (1, 1)
    rates = np.array(schedule_for(lessons[4].recipe, lessons[4].steps)(np.arange(0, 97_000, 1000)))
    np.testing.assert_allclose(rates, 1e-6, rtol=1e-6)
    assert lessons[4].recipe.fpn_lr_multiplier * 1e-6 == 1e-6 and lessons[4].recipe.heads_lr_multiplier * 1e-6 == pytest.approx(1e-5, rel=1e-12)
    assert all((lesson.recipe.batch_size, lesson.recipe.optimizer.gradient_accumulation_steps, lesson.recipe.optimizer.weight_decay, lesson.recipe.optimizer.clip_norm, lesson.recipe.early_stopping_patience) == (4, 8, 5e-3, 10.0, 7) for lesson in lessons)

def test_the_run_goes_through_its_stages_by_itself(seen):
    rows = seen["rows"]
    assert seen["steps"] == STEPS and [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 15]
    assert [int(row["stage"]) for row in rows] == [1, 1, 1, 2, 2, 3] and [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert seen["updates"] == [8, 4, 8]                                   # counted in micro-batches: each stage has an optimizer of its own, and at its end, planned or not, one step for those that wait
    assert [row["learning_rate"] for row in rows[:3]] == [0, 0, 0] and rows[5]["learning_rate"] == 1e-3 and 0 < rows[4]["learning_rate"] < rows[3]["learning_rate"] < 0.01
    assert seen["moved"][0] > 0.9 * seen["of"] and 0 < seen["moved"][1] < 0.4 * seen["of"]   # at the end only the heads learn

def test_patience_ends_a_stage_and_the_next_one_goes_on(seen):
    losses = [row["val_loss"] for row in seen["rows"]]
    assert losses[0] == losses[1] == losses[2] != losses[4]     # in between only two of four micro-batches wait

def test_each_stage_is_measured_on_the_chunks_before_it(seen):
    assert [("AP_stage1" in row, "AP_stage2" in row) for row in seen["rows"]] == [(True, False)] * 3 + [(True, True)] * 3

def test_averages_are_measured_beside_the_raw_weights(seen):
    assert all({"val_loss_average", "AP_average"} <= row.keys() for row in seen["rows"]) and {"best.weights.h5", "last.weights.h5", "last-average.weights.h5"} <= set(seen["files"])
    pairs = [(row["val_loss"], row["val_loss_average"]) for row in seen["rows"]]
    assert all(raw == average for raw, average in pairs[:3]) and all(raw != average for raw, average in pairs[4:])     # where nothing moves, the average is the weights

def test_deaths_inside_stages_and_between_them_change_nothing(seen):
    assert [end and end.split(":")[0].split("/")[-1] for end in seen["deaths"]] in [["Killed"] * 4 + [f"{name}.weights.h5", None] for name in ("best", "last")]
    assert seen["lived"] == [6, 1, 2, 4, 6, 5], "the steps of each life, the one before which it died among them"
    assert seen["arrays"] > 150 and not seen["different"] and seen["same rows"]

def test_a_full_disk_is_a_sentence_and_the_run_goes_on(seen):
    assert "cannot be written" in seen["deaths"][4] and "make room there" in seen["deaths"][4] and "--resume" in seen["deaths"][4]

def test_what_belongs_to_another_run_is_refused_and_nothing_is_touched(seen):
    refused = seen["refused"]
    assert "network.tower_depth is 1 there and 2 here" in refused["another network"]
    assert "data.fingerprint is" in refused["other pictures"] and "recipe.stages is" in refused["other stages"]
    assert "checkpoint.npz: damaged, or not whole" in refused["cut off"]
    assert not seen["touched"]

@pytest.mark.parametrize("change, words", [
    ({"learning_rate": 1.0}, "no field recipe.optimizer.learning_rate"), ({"learning_rate": -1.0}, "learning_rate -1.0: must not be negative"),
    ({"stages": [{"pictures": [0, 6]}, {"pictures": [4, 8]}]}, "0:6 and 4:8 overlap"), ({"stages": [{"speed": 3}]}, "there is no field speed"),
    ({"stages": [{"learning_rate": -1.0}]}, "learning_rate -1.0: must not be negative")])
def test_a_configuration_that_means_nothing_is_refused(tmp_path, change, words):
    from fcos_lite.train import __main__ as train
    from fcos_lite.config import SCRATCH_RECIPE, REFERENCE, InputError
    run = train.Run.create(tmp_path / "run")
    run.write_config(REFERENCE, SCRATCH_RECIPE, {"scenes": 9})
    page = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps(page | {"recipe": page["recipe"] | change}))
    before = (run.path / "config.json").read_bytes()
    with pytest.raises(InputError) as caught: train.main(["--resume", str(run.path)])
    assert words in str(caught.value) and "config.json" in str(caught.value)
    assert [path.name for path in run.path.iterdir()] == ["config.json"] and (run.path / "config.json").read_bytes() == before

@pytest.mark.parametrize("flags, words", [
    (["--stage", "images=0:6", "--stage", "images=4:8"], "overlap"), (["--stage", "images=0:6 speed=3"], "there is no field speed"), (["--stage", "learning_rate=-1"], "must not be negative"),
    (["--stage", "images=5:12"], "there are only 9 to learn from; end it at 9"), (["--stage", "images=20:30"], "leave it out"), (["--stage", "images=0:1"], "fewer than one batch"),
    (["--stage", "pictures=many"], "pictures cannot be many"), (["--minutes", "1", *STAGES], "a clock knows one stage only")])
def test_stages_that_mean_nothing_are_refused_before_there_is_a_folder(tmp_path, flags, words):
    from fcos_lite.train import __main__ as train
    from fcos_lite.config import InputError
    with pytest.raises(InputError, match=words): train.main([*TINY, *flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()

def test_the_source_s_recipe_follows_its_curriculum_and_epochs_mean_one_stage(tmp_path, monkeypatch):
    from fcos_lite.train import __main__ as train
    class Enough(Exception): pass
    def stop(run, network, recipe, *args):
        asked.append((recipe, train.Run(run.path).preset()[1]))
        raise Enough
    monkeypatch.setattr(train, "learn", stop)
    asked = []
    for number, flags in enumerate(([], ["--epochs", "4"], ["--recipe", "scratch"], ["--stage", "epochs=2"])):
        with pytest.raises(Enough): train.main([*TINY, "--recipe", "reference", *flags, "--out", str(tmp_path / str(number))])
    assert all(ours == kept for ours, kept in asked)                      # config.json has the stages, so --resume has
    assert [[(stage.images, stage.epochs) for stage in recipe.stages] for recipe, _ in asked] == [[((0, 9), 30), ((), 10)], [], [], [((), 2)]]
    assert asked[1][0].epochs == 4

def test_two_processes_cannot_train_in_one_folder(tmp_path):
    from fcos_lite.train import __main__ as train
    from fcos_lite.config import SCRATCH_RECIPE, REFERENCE, InputError
    run = train.Run.create(tmp_path / "run")
    run.write_config(REFERENCE, SCRATCH_RECIPE, {"scenes": 9})
    with train.locked(run.path):
        with pytest.raises(InputError, match="another process is at work"): train.main(["--resume", str(run.path)])
        with pytest.raises(InputError, match="another process is at work"): train.Run.create(run.path, force=True)
    assert [path.name for path in run.path.iterdir()] == ["config.json"]

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_disk_that_is_really_full_keeps_the_rows_and_says_so(tmp_path):
    from fcos_lite.config import InputError
    from fcos_lite.train.run import Run
    run = Run(tmp_path)
    run.write_row({"epoch": 1, "loss": 2.0})
    aside = tmp_path / f"partial-{os.getpid()}-metrics.csv"
    aside.symlink_to("/dev/full")
    with pytest.raises(InputError, match="metrics.csv: cannot be written .No space left on device.*--resume"): run.write_row({"epoch": 2, "loss": 1.0})
    assert [row["epoch"] for row in run.rows()] == [1] and not aside.is_symlink()
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with pytest.raises(InputError, match="log.txt: cannot be written .No space left on device"): run.log("hello")

@pytest.mark.slow
def test_a_real_kill_between_stages_and_inside_one(tmp_path):
    "The command, killed by the system where its log says so; resumed by the command."
    from fcos_lite.train.checkpoint import LAST, read_checkpoint
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    def command(argv, until=None):
        with subprocess.Popen([sys.executable, "-u", "-m", "fcos_lite.train", *argv], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
            for line in process.stdout:
                if until and until in line:
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
