"""A Trainer with the callback, against loops by hand and against itself without interruptions."""

import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from ewc_lib import EWC
from ewc_lib.regularizers import L2, MAS, SI, AdapterEWC, LwF
from tests.scenarios import same

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from ewc_lib.integrations.transformers import FILE, EWCCallback  # noqa: E402

RATE = 0.1
CONFIG = {
    "vocab_size": 12,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 4,
    "max_position_embeddings": 8,
    "initializer_range": 0.5,
}


class Words(nn.Module):
    """A model of one's own."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.dropout = nn.Embedding(12, 4), nn.Dropout(dropout)
        self.head = nn.Linear(4, 2)

    def forward(self, input_ids, labels=None):
        logits = self.head(self.dropout(self.embed(input_ids).tanh().mean(1)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def bert(**options):
    torch.manual_seed(0)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**CONFIG, **none, **options)
    return transformers.BertForSequenceClassification(config)


def task(seed, n=8):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(1, 12, (n, 5), generator=generator)
    return [{"input_ids": row, "labels": i % 2} for i, row in enumerate(rows)]


def batch(data):
    return [transformers.default_data_collator(data)]


def train(model, data, folder, callback, *, resume=None, callbacks=(), optimizers=None, **options):
    settings = {
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": RATE,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    more = {} if optimizers is None else {"optimizers": optimizers}
    trainer = Trainer(
        model,
        TrainingArguments(str(folder), **settings | options),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[*([callback] if callback else []), *callbacks],
        **more,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'pin_memory' argument")
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def sgd(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def by_hand(model, regularizer, data, form, steps=3):
    """The same training, in which every call is written down."""
    optimizer, _ = sgd(model.train())
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch(data)[0])["loss"].backward()
        regularizer.before_step()
        if form == "gradient":
            regularizer.add_gradient_()
        optimizer.step()
        if form == "proximal":
            regularizer.proximal_step_(optimizer)
        regularizer.after_step()
    regularizer.consolidate(batch(data))


def after_task_a(make=EWC, strength=20.0, **options):
    """Return a network that has left its optimum, and what holds it there."""
    model = Words(**options)
    regularizer = make(model, strength)
    by_hand(model, regularizer, task(0), "gradient")
    return model, regularizer


def close(one, other):
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("form", ["proximal", "gradient"])
@pytest.mark.parametrize(("make", "strength"), [(EWC, 50.0), (L2, 2.0), (SI, 200.0), (MAS, 20.0)])
def test_it_does_what_the_calls_by_hand_do_once_a_step(
    make, strength, form, accumulation, tmp_path
):
    def learn(how, data):
        model = Words()
        regularizer = make(model, strength)
        by_hand(model, regularizer, task(0), "gradient")
        how(model, regularizer, data)
        return parameters(model), regularizer

    def with_trainer(model, regularizer, data):
        callback = EWCCallback(regularizer, form=form, consolidate_with=data)
        train(
            model, data, tmp_path, callback, max_grad_norm=0.0,
            per_device_train_batch_size=8 // accumulation, optimizers=sgd(model),
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip

    def without_penalty(model, regularizer, data):
        regularizer.strength = 0.0
        by_hand(model, regularizer, data, form)

    one, first = learn(lambda *own: by_hand(*own, form), task(1))
    other, second = learn(with_trainer, task(1))
    free, _ = learn(without_penalty, task(1))
    close(one, other)
    close(first.state_dict(), second.state_dict())
    assert second.n_tasks == 2
    drift = {n: (free[n] - p).abs().max() for n, p in one.items()}
    errors = {n: (other[n] - p).abs().max() for n, p in one.items()}
    assert max(drift.values()) > 100 * max(errors.values())  # without it, it goes elsewhere


def test_the_log_has_the_penalty_and_the_distance(tmp_path):
    model, ewc = after_task_a()
    trainer = train(model, task(1), tmp_path, EWCCallback(ewc), eval_strategy="epoch")
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    moved = [(p - ewc.anchor[n]).square().sum() for n, p in model.named_parameters()]
    assert entries[-1]["ewc/penalty"] == pytest.approx(ewc.penalty().item(), rel=1e-5)
    assert entries[-1]["ewc/distance"] == pytest.approx(sum(moved).sqrt().item(), rel=1e-5)
    assert all(e["ewc/distance"] > 0 for e in entries)
    others = [entry for entry in trainer.state.log_history if "loss" not in entry]
    assert not any("ewc/penalty" in entry for entry in others)


def test_the_log_of_a_first_task_has_no_penalty_yet(tmp_path):
    model = Words()
    trainer = train(model, task(0), tmp_path, EWCCallback(EWC(model, 1.0)))
    assert trainer.state.log_history[0]["ewc/penalty"] == 0
    assert trainer.state.log_history[0]["ewc/distance"] == 0


class Stop(TrainerCallback):
    """Ends a training early, in one of the events that may."""

    def __init__(self, event, step=2):
        self.step = step
        setattr(self, event, self._stop)

    def _stop(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


class Upload(TrainerCallback):
    """Reads a checkpoint as soon as it is there."""

    def __init__(self):
        self.n_tasks = []

    def on_save(self, args, state, control, **kwargs):
        self.n_tasks.append(int(load_file(last_checkpoint(args.output_dir) / FILE)["n_tasks"]))


def last_checkpoint(folder):
    return Path(transformers.trainer_utils.get_last_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("options", "event"),
    [
        ({"save_strategy": "steps", "save_steps": 2}, None),
        ({"save_strategy": "steps", "save_steps": 500}, None),
        ({"save_strategy": "epoch"}, None),
        ({"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}, None),
        ({"save_strategy": "epoch"}, "on_step_end"),
        ({"save_strategy": "epoch", "eval_strategy": "epoch"}, "on_evaluate"),
    ],
)
def test_the_last_checkpoint_holds_the_task(options, event, tmp_path):
    model = Words()
    ewc = EWC(model, 10.0)
    upload = Upload()
    callbacks = [upload, *([Stop(event)] if event else [])]
    train(model, task(0), tmp_path, EWCCallback(ewc, consolidate_with=True),
          callbacks=callbacks, **options)  # fmt: skip
    last = last_checkpoint(tmp_path)
    twin = Words()
    twin.load_state_dict(load_file(last / "model.safetensors"))
    restored = EWC(twin, 10.0)
    restored.load_state_dict(load_file(last / FILE))
    assert restored.n_tasks == ewc.n_tasks == 1
    assert upload.n_tasks == [0] * (len(upload.n_tasks) - 1) + [1]
    assert same(restored.anchor, parameters(twin))
    assert same(restored.state_dict(), ewc.state_dict())


def test_the_task_is_consolidated_at_the_best_parameters_if_these_are_loaded(tmp_path):
    model = Words()
    ewc = EWC(model, 10.0)
    trainer = train(
        model, task(0), tmp_path, EWCCallback(ewc, consolidate_with=True),
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    best, last = Path(trainer.state.best_model_checkpoint), last_checkpoint(tmp_path)
    assert best != last
    assert same(ewc.anchor, parameters(model))
    assert same(load_file(best / FILE), ewc.state_dict())
    assert load_file(last / FILE)["n_tasks"] == 0


def test_without_checkpoints_the_task_is_consolidated_when_training_ends(tmp_path):
    model = Words()
    ewc = EWC(model, 10.0)
    train(model, task(0), tmp_path, EWCCallback(ewc, consolidate_with=True, n_samples=3))
    assert ewc.n_tasks == 1
    assert ewc.precision.n_samples == 3
    assert not list(tmp_path.rglob(FILE))


@pytest.mark.parametrize("kind", ["data set", "loader", "own"])
def test_the_data_of_a_task_may_come_in_several_forms(kind, tmp_path):
    model = Words()
    ewc = EWC(model, 10.0)
    loader = DataLoader(task(0), 3, collate_fn=transformers.default_data_collator)
    data = {"data set": task(0), "loader": loader, "own": True}[kind]
    train(model, task(0), tmp_path, EWCCallback(ewc, consolidate_with=data))
    wanted = EWC(model, 10.0).consolidate(batch(task(0)))
    close(wanted.diagonal(), ewc.precision.diagonal())


class Grouped(EWC):
    """An EWC that notes whether processes are to share the data."""

    def consolidate(self, data, *, group=None, **options):
        self.group = group
        return super().consolidate(data, group=group, **options)


@pytest.mark.parametrize(("kind", "group"), [("data set", False), ("own", False), ("loader", None)])
def test_a_data_set_is_read_by_every_process_and_a_loader_gives_each_its_part(
    kind, group, tmp_path
):
    model = Words()
    ewc = Grouped(model, 10.0)
    loader = DataLoader(task(0), 3, collate_fn=transformers.default_data_collator)
    data = {"data set": task(0), "loader": loader, "own": True}[kind]
    train(model, task(0), tmp_path, EWCCallback(ewc, consolidate_with=data))
    assert ewc.group is group


def test_a_callback_serves_two_trainers_one_after_the_other(tmp_path):
    model = Words()
    ewc = EWC(model, 20.0)
    callback = EWCCallback(ewc, consolidate_with=True)
    first = train(model, task(0), tmp_path / "a", callback)
    before = parameters(model)
    train(model, task(1), tmp_path / "b", callback)
    assert ewc.n_tasks == 2
    assert not first.optimizer.optimizer._optimizer_step_post_hooks
    free = Words()
    free.load_state_dict(before)
    train(free, task(1), tmp_path / "c", None)
    far, near = (
        sum((p - before[n]).square().sum() for n, p in m.named_parameters()) for m in (free, model)
    )
    assert near < far


def test_a_training_that_failed_is_begun_again(tmp_path):
    model, ewc = after_task_a()
    callback = EWCCallback(ewc, consolidate_with=True)

    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(model, task(1), tmp_path, callback, callbacks=[Fail()])
    trainer = train(model, task(1), tmp_path, callback)
    assert ewc.n_tasks == 2
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks


def test_evaluations_in_between_change_nothing(tmp_path):
    found = []
    for options in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        model, ewc = after_task_a()
        train(model, task(1), tmp_path, EWCCallback(ewc, consolidate_with=True), **options)
        found.append((parameters(model), ewc.state_dict()))
    assert same(found[0][0], found[1][0])
    assert same(found[0][1], found[1][1])


def test_a_collator_that_pads_is_used_for_the_task_as_well(tmp_path):
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"[PAD]": 0}))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    data = [
        {"input_ids": list(range(1, 3 + i % 3)), "attention_mask": [1] * (2 + i % 3),
         "labels": i % 2, "text": "not for the model"} for i in range(8)
    ]  # fmt: skip
    model = bert()
    ewc = EWC(model, 10.0)
    args = TrainingArguments(str(tmp_path), max_steps=2, per_device_train_batch_size=4,
                             report_to="none", disable_tqdm=True, use_cpu=True)  # fmt: skip
    collator = transformers.DataCollatorWithPadding(tokenizer)
    callback = EWCCallback(ewc, consolidate_with=data)
    trainer = Trainer(model, args, collator, train_dataset=data, callbacks=[callback])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    kept = [{key: row[key] for key in row if key != "text"} for row in data]
    wanted = EWC(model, 10.0).consolidate(DataLoader(kept, 3, collate_fn=collator))
    close(wanted.diagonal(), ewc.precision.diagonal())


@pytest.mark.parametrize("options", [{"return_dict": False}, {"num_labels": 3}])
def test_models_that_return_tuples_or_have_more_classes_are_held(options, tmp_path):
    model = bert(**options)
    ewc = EWC(model, 10.0)
    train(model, task(0), tmp_path, EWCCallback(ewc, consolidate_with=True))
    assert ewc.precision.trace() > 0
    assert ewc.n_tasks == 1


def test_label_smoothing_leaves_the_likelihood_that_of_the_output(tmp_path):
    model = bert()
    ewc = EWC(model, 10.0)
    callback = EWCCallback(ewc, consolidate_with=True)
    train(model, task(0), tmp_path, callback, label_smoothing_factor=0.2)
    wanted = EWC(model, 10.0).consolidate(batch(task(0)))
    close(wanted.diagonal(), ewc.precision.diagonal())


def test_a_callback_of_another_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds none of the parameters"):
        train(Words(), task(0), tmp_path, EWCCallback(EWC(Words(), 1.0)))


def test_a_function_penalty_acts_by_its_gradient(tmp_path):
    model = Words()
    callback = EWCCallback(LwF(model, 1.0))
    trainer = train(model, task(1), tmp_path, callback)
    assert "ewc/penalty" not in trainer.state.log_history[0]
    with pytest.raises(ValueError, match="no proximal step"):
        train(model, task(1), tmp_path, EWCCallback(LwF(model, 1.0), form="proximal"))


def test_the_trainer_of_trl_takes_it(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["[PAD]", "[EOS]", *"abcde"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", eos_token="[EOS]"
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    texts = datasets.Dataset.from_dict({"text": ["a b c d", "b c d e a", "c d", "d e a b"]})
    ewc = EWC(model, 100.0)
    for n in (1, 2):
        trainer = trl.SFTTrainer(
            model,
            args=trl.SFTConfig(
                str(tmp_path), max_steps=2, per_device_train_batch_size=2, logging_steps=1,
                report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
            ),
            train_dataset=texts,
            processing_class=tokenizer,
            callbacks=[EWCCallback(ewc, consolidate_with=True)],
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        assert load_file(last_checkpoint(tmp_path) / FILE)["n_tasks"] == n
    assert trainer.state.log_history[-2]["ewc/penalty"] > 0
    assert ewc.precision.trace() > 0


# Interruptions

LONG = {
    "max_steps": 9,
    "per_device_train_batch_size": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "warmup_steps": 3,
}
"""Three epochs of three steps; a checkpoint in the middle of an epoch, and at an end of one."""


class Kill(TrainerCallback):
    """Kills the process as nothing can be told of before."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def second_task(folder, make=EWC, resume=None, callbacks=(), held=True, **options):
    """Learn task B; a process that resumes knows of task A from the checkpoint alone."""
    strength = {EWC: 20.0, SI: 5.0}[make]
    if held:
        model, regularizer = after_task_a(make, strength, dropout=0.1)
    else:
        model = Words(dropout=0.1)
        regularizer = make(model, strength)
    torch.manual_seed(int(held))
    callback = EWCCallback(regularizer, consolidate_with=True)
    data = task(1, n=9)
    trainer = train(model, data, folder, callback, resume=resume, callbacks=callbacks,
                    **LONG | options)  # fmt: skip
    return model, regularizer, trainer


def killed(folder, make):
    """Start a training in a process of its own, which is killed."""
    program = (
        "from tests.integrations import test_transformers as own\n"
        f"own.second_task({str(folder)!r}, own.{make.__name__}, callbacks=[own.Kill()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("make", [EWC, SI])
def test_a_killed_training_that_resumes_ends_bit_by_bit_as_one_that_was_not(make, tmp_path):
    model, regularizer, _ = second_task(tmp_path / "whole", make)
    killed(tmp_path / "killed", make)
    assert last_checkpoint(tmp_path / "killed").name == "checkpoint-4"
    found, restored, trainer = second_task(tmp_path / "killed", make, resume=True, held=False)
    assert same(parameters(model), parameters(found))
    assert same(regularizer.state_dict(), restored.state_dict())
    assert restored.n_tasks == 2
    assert trainer.state.log_history[-2]["ewc/penalty"] > 0


@pytest.mark.parametrize("moved", [True, False])
def test_a_training_resumes_from_a_folder_elsewhere(moved, tmp_path):
    model, ewc, _ = second_task(tmp_path / "a")
    start = tmp_path / "a" / "checkpoint-4"
    if moved:
        start = Path(shutil.move(start, tmp_path / "copy"))
    other = tmp_path / "b" / "checkpoint-4"
    other.mkdir(parents=True)
    (other / FILE).write_text("of another training")
    found, restored, _ = second_task(tmp_path / "b", resume=str(start), held=False)
    assert same(parameters(model), parameters(found))
    assert same(ewc.state_dict(), restored.state_dict())


def test_a_training_that_was_killed_after_its_last_checkpoint_has_the_task_once(tmp_path):
    _, ewc, _ = second_task(tmp_path)
    _, restored, _ = second_task(tmp_path, resume=True, held=False)
    assert restored.n_tasks == 2
    assert same(ewc.state_dict(), restored.state_dict())


def test_what_follows_the_end_of_a_task_is_the_next_one_and_that_is_said(tmp_path):
    second_task(tmp_path)
    with pytest.warns(RuntimeWarning, match="counts as the next one"):
        _, ewc, _ = second_task(tmp_path, resume=True, held=False, max_steps=12)
    assert ewc.n_tasks == 3


def with_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    model = peft.get_peft_model(bert(), config)
    return model, AdapterEWC(model, 20.0)


def test_adapters_of_peft_resume_bit_by_bit(tmp_path):
    def learn(folder, resume=None, held=True):
        model, ewc = with_adapters()
        callback = EWCCallback(ewc, consolidate_with=True)
        if held:
            train(model, task(0), tmp_path / "a", callback)
        trainer = train(model, task(1), folder, callback, resume=resume, **LONG)
        return parameters(model), ewc, trainer

    whole, first, _ = learn(tmp_path / "whole")
    found, second, trainer = learn(
        tmp_path / "other", str(tmp_path / "whole" / "checkpoint-4"), held=False
    )
    assert same(whole, found)
    assert second.n_tasks == 2
    assert same(first.state_dict(), second.state_dict())
    assert trainer.state.log_history[-2]["ewc/penalty"] > 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_half_precision_resumes_bit_by_bit_as_well(tmp_path):
    model, ewc, _ = second_task(tmp_path / "a", bf16=True)
    start = str(tmp_path / "a" / "checkpoint-4")
    found, restored, _ = second_task(tmp_path / "b", resume=start, held=False, bf16=True)
    assert same(parameters(model), parameters(found))
    assert same(ewc.state_dict(), restored.state_dict())


def test_a_trainer_that_trains_again_learns_the_next_task(tmp_path):
    model = Words()
    ewc = EWC(model, 20.0)
    trainer = train(model, task(0), tmp_path, EWCCallback(ewc, consolidate_with=True))
    trainer.train_dataset = task(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'pin_memory' argument")
        trainer.train()
    assert ewc.n_tasks == 2
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks


def test_a_checkpoint_without_a_state_is_refused(tmp_path):
    second_task(tmp_path)
    (tmp_path / "checkpoint-4" / FILE).unlink()
    with pytest.raises(FileNotFoundError, match="saved without this callback"):
        second_task(tmp_path, resume=str(tmp_path / "checkpoint-4"), held=False)
