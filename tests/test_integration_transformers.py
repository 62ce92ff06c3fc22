"""A transformers model with the packed forward, under transformers' own Trainer: the padded run's losses, and nothing of theirs lost."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from padded import pad, pixels, rows_of
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, Trainer, TrainingArguments
from transformers.integrations.neftune import neftune_post_forward_hook

from llava_fast.batch import IGNORE
from llava_fast.integrations.transformers import PackingCollator, patch, unpatch
from llava_fast.models.layers import call_linear

SHAPES = [[5, "image", 12], [17], [3, "image", 2, "image", 9], [6, "image", 8], [21], [4, "image", 30], [9], ["image", 14]]


def samples_of(hf, seed=0):
    """Ids, labels of the last third, pictures: made once, for both sides."""
    image = hf.config.image_token_id
    patches = 9
    rows, _ = rows_of(SHAPES, patches, image, seed)
    made = []
    for number, row in enumerate(rows):
        labels = [token if i >= 2 * len(row) // 3 and token != image else IGNORE for i, token in enumerate(row)]
        count = SHAPES[number].count("image")
        made.append({"input_ids": row, "labels": labels} | ({"pixel_values": pixels(count, seed=number)} if count else {}))
    return made


def pad_samples(samples):
    ids, mask = pad([sample["input_ids"] for sample in samples], "right")
    labels, _ = pad([sample["labels"] for sample in samples], "right", IGNORE)
    views = [sample["pixel_values"] for sample in samples if "pixel_values" in sample]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels} | ({"pixel_values": torch.cat(views)} if views else {})


def load(directory):
    return LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)


def trainer(model, samples, collator, out, **changes):
    settings = dict(per_device_train_batch_size=2, learning_rate=1e-3, max_steps=6, logging_steps=1, seed=0, use_cpu=True)
    settings |= dict(report_to=[], save_strategy="no", remove_unused_columns=False, max_grad_norm=1.0, disable_tqdm=True)
    arguments = TrainingArguments(output_dir=str(out), **{**settings, **changes})
    return Trainer(model=model, args=arguments, train_dataset=samples, data_collator=collator, eval_dataset=samples)


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["qwen", "llama"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_trainer_loses_what_the_padded_one_does(directory, processor, tmp_path, accumulate):
    theirs, ours = load(directory), patch(load(directory))
    samples = samples_of(theirs)
    expected = losses(trainer(theirs, samples, pad_samples, tmp_path / "a", gradient_accumulation_steps=accumulate))
    found = losses(trainer(ours, samples, PackingCollator(processor, 500), tmp_path / "b", gradient_accumulation_steps=accumulate))
    assert len(found) == 6 and found[-1] != found[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("kind", ["qwen", "llama"])
def test_loss_and_gradients_of_padded_and_of_packed_batches(directory, processor):
    theirs, ours = load(directory).train(), patch(load(directory)).train()
    samples = samples_of(theirs)
    padded, packed = pad_samples(samples), PackingCollator(processor)(samples)
    expected = theirs(**padded).loss
    expected.backward()
    scale = torch.nn.utils.get_total_norm([p.grad for p in theirs.parameters() if p.grad is not None])
    for batch in (padded, packed):
        ours.zero_grad()
        output = ours(**batch)
        output.loss.backward()
        assert output.logits is None
        torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=0)
        for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            if b.grad is None:  # a layer of the tower that nothing reads
                assert a.grad is None, name
            else:
                assert (a.grad - b.grad).norm() < 1e-5 * b.grad.norm() + 1e-6 * scale, name
    summed = ours(**packed, num_items_in_batch=torch.tensor(7)).loss
    labels = int((packed["labels"] != IGNORE).sum())
    torch.testing.assert_close(summed, expected * labels / 7, rtol=1e-5, atol=0)


def test_a_packed_row_is_transformers_own_padding_free_one(checkpoints):
    """The collator's row, in the model that is not patched."""
    theirs = load(checkpoints["qwen"]).train()
    row = PackingCollator(AutoProcessor.from_pretrained(checkpoints["qwen"]))(samples_of(theirs))
    expected = theirs(**row, use_cache=False).loss
    torch.testing.assert_close(patch(theirs)(**row).loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["qwen"])
def test_everything_else_is_as_before(directory, processor, tmp_path):
    theirs, ours = load(directory).eval(), patch(load(directory)).eval()
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert [name for name, _ in theirs.named_parameters()] == [name for name, _ in ours.named_parameters()]
    batch = pad_samples(samples_of(theirs))
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, theirs(**batch).logits)
        assert torch.equal(ours(**batch).loss, theirs(**batch).loss)
        prompt = {name: value for name, value in batch.items() if name != "labels"}
        left, mask = pad([s["input_ids"] for s in samples_of(theirs)], "left")
        prompt |= {"input_ids": left, "attention_mask": mask}
        asked = dict(max_new_tokens=5, do_sample=False)
        assert torch.equal(ours.train().generate(**prompt, **asked), theirs.train().generate(**prompt, **asked))
    run = trainer(ours, samples_of(theirs), PackingCollator(processor), tmp_path, max_steps=2)
    run.train()
    evaluated = run.evaluate()["eval_loss"]
    ours.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    for (name, a), (_, b) in zip(again.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert trainer(again, samples_of(again), pad_samples, tmp_path).evaluate()["eval_loss"] == pytest.approx(evaluated, rel=1e-5)
    unpatch(ours)
    assert "forward" not in vars(ours) and not hasattr(ours, "_llava_fast")
    torch.testing.assert_close(ours.eval()(**batch).logits, again.eval()(**batch).logits)


def test_a_copy_is_patched_too_and_apart(checkpoints, processor_of):
    ours = patch(load(checkpoints["qwen"]))
    other = copy.deepcopy(ours)
    row = PackingCollator(processor_of["qwen"])(samples_of(ours))
    with torch.no_grad():
        before = ours(**row).loss
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert not torch.equal(other(**row).loss, before) and torch.equal(ours(**row).loss, before)


@pytest.fixture(scope="module")
def processor_of(checkpoints):
    return {kind: AutoProcessor.from_pretrained(checkpoints[kind]) for kind in ("qwen", "llama")}


@pytest.mark.parametrize("patched", ["before", "after"])
def test_adapters_of_peft(checkpoints, processor_of, patched):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.0,
        target_modules=r".*language_model.*\.(q|v|o|up|down)_proj|.*vision_tower.*fc1",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
    )
    torch.manual_seed(0)
    theirs = get_peft_model(load(checkpoints["qwen"]), lora).train()
    torch.manual_seed(0)
    ours = get_peft_model(patch(load(checkpoints["qwen"])) if patched == "before" else load(checkpoints["qwen"]), lora).train()
    ours = ours if patched == "before" else patch(ours)
    samples = samples_of(theirs.get_base_model())
    optimizers = [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2) for model in (theirs, ours)]
    row, padded = PackingCollator(processor_of["qwen"])(samples), pad_samples(samples)
    for _ in range(3):
        expected, found = theirs(**padded).loss, ours(**row).loss
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        for loss, optimizer in zip((expected, found), optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert ours.get_base_model().model.multi_modal_projector.modules_to_save["default"].linear_1.weight.requires_grad


def adapted(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    kinds = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    return get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, target_modules=kinds, init_lora_weights=False)).train()


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_take_one_dtype_and_are_given_it(checkpoints, processor_of, stored, autocast):
    """On a CPU the packed forward is in fp32 whatever the weights are in, and whatever autocast asks for."""
    exact = adapted(load(checkpoints["qwen"]))
    samples = samples_of(exact.get_base_model())
    row = PackingCollator(processor_of["qwen"])(samples)
    model = patch(adapted(LlavaForConditionalGeneration.from_pretrained(checkpoints["qwen"], dtype=stored)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(**row).loss
    loss.backward()
    expected = exact(**pad_samples(samples)).loss
    expected.backward()
    tolerance = 1e-5 if stored == torch.float32 else 0.05
    torch.testing.assert_close(loss.float(), expected, rtol=tolerance, atol=0)
    for (name, a), (_, b) in zip(model.named_parameters(), exact.named_parameters(), strict=True):
        if b.requires_grad:
            assert (a.grad.float() - b.grad).norm() <= (1e-5 if stored == torch.float32 else 0.2) * b.grad.norm(), name


def test_an_adapter_in_bf16_is_that_of_autocast(checkpoints):
    """As under autocast on a GPU: rows in bf16 meet weights in fp32."""
    model = adapted(load(checkpoints["qwen"]))
    part = model.get_base_model().model.language_model.layers[0].mlp.up_proj
    x = torch.randn(5, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = part(x)
        with torch.autocast("cpu", enabled=False):
            found = call_linear(part, x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


def test_noise_on_embeddings_is_that_of_the_hook(checkpoints, processor_of):
    """NEFTune's hook draws for the row it is given: transformers' own padding-free row has the same loss from the same seed."""
    theirs, ours = load(checkpoints["qwen"]).train(), patch(load(checkpoints["qwen"])).train()
    row = PackingCollator(processor_of["qwen"])(samples_of(theirs))
    plain = ours(**row).loss.detach()
    losses, gradients = [], []
    for model in (theirs, ours):
        table = model.get_input_embeddings()
        table.neftune_noise_alpha = 5.0
        table.register_forward_hook(neftune_post_forward_hook)
        torch.manual_seed(3)
        loss = model(**row, **({"use_cache": False} if model is theirs else {})).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(table.weight.grad)
    assert (losses[1] - plain).abs() > 1e-3
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()
    text = PackingCollator(processor_of["qwen"])(samples_of(theirs)[1:2])
    torch.manual_seed(4)
    expected = theirs(**text, use_cache=False).loss
    torch.manual_seed(4)
    torch.testing.assert_close(ours(**text).loss, expected, rtol=1e-5, atol=0)


def test_a_trainer_with_noise_on_embeddings(checkpoints, processor_of, tmp_path):
    theirs, ours = load(checkpoints["qwen"]), patch(load(checkpoints["qwen"]))
    samples, collate = samples_of(theirs), PackingCollator(processor_of["qwen"])
    plain = losses(trainer(patch(load(checkpoints["qwen"])), samples, collate, tmp_path / "c"))
    theirs.config.use_cache = theirs.config.text_config.use_cache = False
    expected = losses(trainer(theirs, samples, collate, tmp_path / "a", neftune_noise_alpha=5.0))
    found = losses(trainer(ours, samples, collate, tmp_path / "b", neftune_noise_alpha=5.0))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.allclose(found, plain, rtol=1e-4)


def test_the_trainer_of_trl_with_the_models_own_loss(checkpoints, processor_of, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets")

    class PackedSFT(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    messages = [
        {"messages": [{"role": "user", "content": "Which one?"}, {"role": "assistant", "content": "the left " * n}]} for n in range(1, 9)
    ]
    collate = PackingCollator(processor_of["qwen"], 500)
    expected = losses(trainer(patch(load(checkpoints["qwen"])), messages, collate, tmp_path / "a"))
    ours = load(checkpoints["qwen"])
    settings = dict(per_device_train_batch_size=2, learning_rate=1e-3, max_steps=6, logging_steps=1, seed=0, use_cpu=True, bf16=False)
    settings |= dict(report_to=[], save_strategy="no", remove_unused_columns=False, max_grad_norm=1.0, disable_tqdm=True)
    settings |= dict(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False)
    run = PackedSFT(
        ours,
        trl.SFTConfig(str(tmp_path / "b"), **settings),
        train_dataset=datasets.Dataset.from_list(messages),
        data_collator=collate,
        processing_class=processor_of["qwen"],
    )
    patch(ours)
    np.testing.assert_allclose(losses(run), expected, rtol=1e-6)


def hooked(model, path, kind):
    module = model.get_submodule(path)
    register = {"forward": "register_forward_hook", "pre": "register_forward_pre_hook", "backward": "register_full_backward_hook"}[kind]

    def looking(*args):
        return None

    return getattr(module, register)(looking)


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize(
    "path", ["lm_head", "model", "model.language_model.layers.1.mlp", "model.vision_tower", "model.language_model.layers.0.mlp.up_proj"]
)
def test_hooks_that_would_not_be_called_are_refused(checkpoints, processor_of, path, kind):
    ours = patch(load(checkpoints["qwen"])).train()
    row = PackingCollator(processor_of["qwen"])(samples_of(ours))
    handle = hooked(ours, path, kind)
    with pytest.raises(ValueError, match=rf"{path} has a hook \(looking\), which the packed forward does not call"):
        ours(**row)
    handle.remove()
    assert ours(**row).loss.isfinite()


def test_hooks_that_are_called_and_hooks_that_say_nothing(checkpoints, processor_of):
    """An adapter is called as it is; what asks for gradients of embeddings, for checkpointing with adapters, changes no number."""
    model = adapted(patch(load(checkpoints["qwen"])))
    row = PackingCollator(processor_of["qwen"])(samples_of(model.get_base_model()))
    expected, seen = model(**row).loss, []
    model.get_base_model().model.language_model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: seen.append(1))
    model.register_forward_hook(lambda *args: seen.append(2))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    loss = model(**row).loss
    assert seen == [1, 2] and torch.equal(loss, expected)
    loss.backward()
    assert 1 in seen[2:]  # run again in the backward pass


def test_gradient_checkpointing_is_asked_for_as_ever(checkpoints, processor_of):
    ours = patch(load(checkpoints["qwen"])).train()
    row = PackingCollator(processor_of["qwen"])(samples_of(ours))
    ours(**row).loss.backward()
    expected = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    ours.zero_grad()
    ours.gradient_checkpointing_enable()
    ours(**row).loss.backward()
    assert ours._llava_fast.ours.language_model.checkpointing == "full"
    assert all(torch.equal(p.grad, expected[name]) for name, p in ours.named_parameters() if name in expected)


def test_grown_embeddings_and_rows_without_labels(checkpoints, processor_of):
    ours = patch(load(checkpoints["qwen"])).train()
    ours.resize_token_embeddings(ours.config.text_config.vocab_size + 8)
    samples = samples_of(ours)
    row = PackingCollator(processor_of["qwen"])(samples)
    row["labels"][0, -1] = ours.get_input_embeddings().weight.shape[0] - 1  # a new row
    assert ours(**row).loss.isfinite()
    row["labels"][:] = IGNORE
    nothing = ours(**row, num_items_in_batch=5).loss
    nothing.backward()
    assert nothing == 0


# --- the collator ---


def picture(seed, size=(60, 40)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize("kind", ["qwen", "llama"])
def test_messages_and_records_give_the_same_row(kind, checkpoints, processor_of, tmp_path):
    picture(0).save(tmp_path / "0.png")
    picture(1).save(tmp_path / "1.png")
    turns = [("human", "<image><image>\nWhat are these?"), ("gpt", "two cats"), ("human", "Which one?"), ("gpt", "the left")]
    record = {"image": ["0.png", "1.png"], "conversations": [{"from": who, "value": text} for who, text in turns]}
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "\nWhat are these?"}]
    messages = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "two cats"}]},
        {"role": "user", "content": "Which one?"},
        {"role": "assistant", "content": "the left"},
    ]
    own = [{**parts[0], "image": str(tmp_path / "0.png")}, {**parts[1], "image": picture(1)}, parts[2]]
    collate = PackingCollator(processor_of[kind], media_folder=str(tmp_path))
    plain = {"messages": [{"role": "user", "content": "Which one?"}, {"role": "assistant", "content": "yes"}]}
    rows = [
        collate([record, plain]),
        collate([{"messages": messages, "images": [picture(0), picture(1)]}, plain]),
        collate([{"messages": [{"role": "user", "content": own}, *messages[1:]]}, plain]),
    ]
    for row in rows[1:]:
        assert row.keys() == rows[0].keys() and all(torch.equal(row[name], rows[0][name]) for name in row)
    row = rows[0]
    image = processor_of[kind].image_token_id
    assert (row["input_ids"] == image).sum() == 2 * 9 and row["pixel_values"].shape == (2, 3, 42, 42)
    assert (row["position_ids"] == 0).sum() == 2
    wanted = processor_of[kind].tokenizer.decode(row["labels"][row["labels"] != IGNORE])
    assert "two cats" in wanted and "the left" in wanted and "yes" in wanted and "What" not in wanted
    theirs = processor_of[kind].image_processor(images=[picture(0), picture(1)], return_tensors="pt")["pixel_values"]
    assert torch.equal(row["pixel_values"], theirs)


def test_no_row_predicts_the_first_token_of_the_next_sample(checkpoints, processor_of):
    """transformers counts labels over the row and shifts them by one: a first token's label would be the sample before's business."""
    samples = [{"input_ids": ids, "labels": ids} for ids in ([5, 6, 7], [8, 9])]
    row = PackingCollator(processor_of["qwen"])(samples)
    assert row["labels"].tolist() == [[IGNORE, 6, 7, IGNORE, 9]] and row["position_ids"].tolist() == [[0, 1, 2, 0, 1]]


def test_the_collator_of_a_model_reads_its_directory(checkpoints, processor_of):
    model = load(checkpoints["qwen"])
    samples = [{"messages": [{"role": "user", "content": "Which one?"}, {"role": "assistant", "content": "yes"}]}]
    a, b = PackingCollator(model)(samples), PackingCollator(processor_of["qwen"])(samples)
    assert all(torch.equal(a[name], b[name]) for name in b)


# --- what is refused ---


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"output_hidden_states": True}, "does not implement output_hidden_states"),
        ({"past_key_values": object()}, "does not implement past_key_values"),
        ({"image_sizes": torch.zeros(1, 2)}, "does not implement image_sizes"),
        ({"vision_feature_layer": -2}, "does not implement vision_feature_layer"),
        ({"logits_to_keep": 1}, "does not implement logits_to_keep"),
        ({"position_ids": torch.tensor([[0, 1, 1, 2]])}, "must count 0, 1, 2"),
        ({"position_ids": torch.tensor([[3, 4, 5, 6]])}, "must count 0, 1, 2"),
        ({"position_ids": torch.tensor([[0, 1, 0]])}, r"one row \[1, T\] of sequences, got input_ids \[1, 4\]"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}, "leave attention_mask out"),
        ({"pixel_values": torch.zeros(1, 3, 42, 42)}, "tokens: 0, features: 9"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 64)}, "does not implement inputs_embeds"),
        ({"input_ids": None}, "needs input_ids"),
    ],
)
def test_what_the_packed_forward_refuses(checkpoints, extra, message):
    ours = patch(load(checkpoints["qwen"])).train()
    ids = torch.tensor([[5, 6, 7, 8]])
    assert ours(input_ids=ids, labels=ids, return_dict=True, use_cache=False, output_attentions=False).loss.isfinite()
    with pytest.raises(ValueError, match=message):
        ours(**{"input_ids": ids, "labels": ids, **extra})


def test_models_that_are_refused(checkpoints):
    with pytest.raises(ValueError, match="got a Linear"):
        patch(torch.nn.Linear(2, 2))
    model = load(checkpoints["qwen"])
    with pytest.raises(ValueError, match="is not patched"):
        unpatch(model)
    with pytest.raises(ValueError, match="patched already"):
        patch(patch(model))
    other = load(checkpoints["qwen"])
    other.hf_device_map = {"model.vision_tower": 0, "lm_head": 1}
    with pytest.raises(ValueError, match="on one device"):
        patch(other)
    del other.hf_device_map
    other.config.text_config.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"attention_dropout must be 0, got 0\.1"):
        patch(other)


def test_adapters_on_the_projector_are_refused(checkpoints):
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match=r"multi_modal_projector\.linear_1 must be an nn\.Linear, got a Linear.*modules_to_save"):
        patch(get_peft_model(load(checkpoints["qwen"]), LoraConfig(target_modules=["linear_1"])))


USER, ANSWER = {"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}
SEEN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}


@pytest.mark.parametrize(
    "sample, message",
    [
        ({"label": 1}, "sample 1 of the batch has neither messages.*remove_unused_columns=False"),
        ({"messages": [USER]}, r"must be user, assistant, \.\.\., assistant, got \['user'\]"),
        ({"messages": [ANSWER, USER]}, "must be user, assistant"),
        ({"messages": [{"role": "tool", "content": "?"}, ANSWER]}, "message 0 needs a role"),
        ({"messages": [SEEN, ANSWER]}, "'images' has none left"),
        ({"messages": [USER, ANSWER], "images": [picture(0)]}, "1 of its images have no place"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}, ANSWER]}, "neither text nor image"),
        ({"messages": [SEEN, ANSWER], "images": ["none.png"]}, "sample 1 of the batch: .*none.png"),
        ({"conversations": [], "image": "none.png"}, "sample 1 of the batch: no file"),
        ({"messages": [USER, {"role": "assistant", "content": "yes " * 300}]}, "more than tokens_per_row 200.*per_device_train_batch_size"),
    ],
)
def test_samples_that_are_refused(checkpoints, processor_of, sample, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator(processor_of["qwen"], 200)([{"messages": [USER, ANSWER]}, sample])


def test_a_processor_is_needed():
    with pytest.raises(ValueError, match="expected a LlavaProcessor.*got a dict"):
        PackingCollator({})
