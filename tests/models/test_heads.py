"""Masked tokens and classes of texts: losses, padding, gradients, saving, and that each learns what it is for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.modeling_outputs import MaskedLMOutput, SequenceClassifierOutput

from splatflow.models import (
    SplatFlowCache,
    SplatFlowConfig,
    SplatFlowForCausalLM,
    SplatFlowForMaskedLM,
    SplatFlowForSequenceClassification,
    SplatFlowModel,
)
from splatflow.nn import MIXERS

VOCAB_SIZE, SEQ_LEN, NUM_LABELS = 31, 37, 3
NUM_TO_LEARN_FROM = 19  # tokens of a text in the tests of learning

# name -> (class, causal)
HEADS = {
    "masked": (SplatFlowForMaskedLM, False),
    "classes": (SplatFlowForSequenceClassification, False),
    "causal classes": (SplatFlowForSequenceClassification, True),
}
every_mixer = pytest.mark.parametrize("mixer", MIXERS)
every_head = pytest.mark.parametrize("head", HEADS)


def tiny_config(**options) -> SplatFlowConfig:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    # Wide initial weights, so that a wrong memory shows in the logits.
    options = {"num_splats": 5, "initializer_range": 0.3, "causal": False, "decay": None, **options}
    return SplatFlowConfig(**sizes, **marks, num_labels=NUM_LABELS, **options)


def tiny_model(head: str, mixer: str = "splat", **options):
    torch.manual_seed(11)
    model_class, causal = HEADS[head]
    return model_class(tiny_config(mixer=mixer, causal=causal, **options)).eval()


def random_tokens(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def labels_for(head: str, tokens: torch.Tensor) -> torch.Tensor:
    return tokens if head == "masked" else tokens[:, 0] % NUM_LABELS


@every_head
@every_mixer
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("conv_size", [3, 4])
def test_padding_on_either_side_changes_nothing(head, mixer, side, conv_size):
    model = tiny_model(head, mixer, conv_size=conv_size).double()
    tokens = random_tokens(3, SEQ_LEN)
    padding = random_tokens(3, 8, seed=4)
    parts, kept = ([padding, tokens], slice(8, None)) if side == "left" else ([tokens, padding], slice(SEQ_LEN))
    mask = torch.zeros(3, SEQ_LEN + 8, dtype=torch.long)
    mask[:, kept] = 1
    with torch.no_grad():
        alone, padded = model(tokens).logits, model(torch.cat(parts, 1), mask).logits
    torch.testing.assert_close(padded[:, kept] if head == "masked" else padded, alone, rtol=0, atol=1e-10)


@every_head
@every_mixer
def test_gradient_checkpointing_changes_no_gradient(head, mixer):
    plain = tiny_model(head, mixer).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable()
    tokens = random_tokens(2, SEQ_LEN)
    for model in (plain, checkpointed):
        model(tokens, labels=labels_for(head, tokens)).loss.backward()
    for (name, expected), found in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert expected.grad is not None, name
        torch.testing.assert_close(found.grad, expected.grad, msg=name)


@every_head
@every_mixer
def test_saved_and_loaded_models_are_equal(head, mixer, tmp_path):
    model = tiny_model(head, mixer)
    model.save_pretrained(tmp_path)
    auto = AutoModelForMaskedLM if head == "masked" else AutoModelForSequenceClassification
    loaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is type(model)
    assert not report["missing_keys"]
    assert loaded.config.causal == model.config.causal
    assert loaded.config.num_labels == NUM_LABELS
    tokens = random_tokens(2, SEQ_LEN)
    assert loaded(tokens).logits.equal(model(tokens).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert base(tokens).last_hidden_state.equal(model.model(tokens).last_hidden_state)


def test_embeddings_and_the_head_of_masked_tokens_are_one():
    model = tiny_model("masked")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    untied = tiny_model("masked", tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


def test_a_language_model_lends_its_body_to_a_classifier(tmp_path):
    language_model = SplatFlowForCausalLM(tiny_config(causal=True))
    language_model.save_pretrained(tmp_path)
    loaded, report = SplatFlowForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"score.weight"}
    tokens = random_tokens(2, SEQ_LEN)
    hidden_states = language_model.model.eval()(tokens).last_hidden_state
    torch.testing.assert_close(loaded(tokens).logits, loaded.score(hidden_states[:, -1]))


def test_the_loss_of_masked_tokens_counts_those_alone():
    model, tokens = tiny_model("masked"), random_tokens(2, SEQ_LEN)
    labels = tokens.clone()
    labels[:, 7:] = -100
    outputs = model(tokens, labels=labels, output_hidden_states=True)
    assert isinstance(outputs, MaskedLMOutput)
    expected = F.cross_entropy(outputs.logits[:, :7].flatten(0, 1), tokens[:, :7].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    assert model.lm_head(outputs.hidden_states[-1]).equal(outputs.logits)
    shared = model(tokens, labels=labels, num_items_in_batch=torch.tensor(140)).loss
    torch.testing.assert_close(shared, expected / 10)
    assert (
        model(inputs_embeds=model.get_input_embeddings()(tokens), labels=labels, return_dict=False)[0] == outputs.loss
    )


@pytest.mark.parametrize("causal", [True, False])
def test_classes_are_read_where_it_is_said(causal):
    model, tokens = tiny_model("causal classes" if causal else "classes"), random_tokens(2, SEQ_LEN)
    mask = torch.ones_like(tokens)
    mask[0, 30:], mask[1, :4] = 0, 0
    outputs = model(tokens, mask, output_hidden_states=True)
    hidden_states = outputs.hidden_states[-1]
    expected = (
        [hidden_states[0, 29], hidden_states[1, -1]]
        if causal
        else [hidden_states[0, :30].mean(0), hidden_states[1, 4:].mean(0)]
    )
    torch.testing.assert_close(outputs.logits, model.score(torch.stack(expected)))
    assert isinstance(outputs, SequenceClassifierOutput)
    assert outputs.loss is None
    assert model(tokens, torch.zeros_like(mask)).logits.isfinite().all()


@pytest.mark.parametrize("head", ["classes", "causal classes"])
def test_texts_of_no_tokens_have_no_class(head):
    model = tiny_model(head)
    with pytest.raises(ValueError, match=r"input_ids has shape \[2, 0\], expected at least one token"):
        model(torch.ones(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"inputs_embeds has shape \[2, 0, 32\], expected at least one token"):
        model(inputs_embeds=torch.ones(2, 0, 32), attention_mask=torch.ones(2, 0))


@pytest.mark.parametrize(
    ("labels", "problem_type", "loss"),
    [
        (torch.tensor([2, 0]), "single_label_classification", F.cross_entropy),
        (torch.tensor([[1.0, 0, 1], [0, 0, 1]]), "multi_label_classification", F.binary_cross_entropy_with_logits),
        (torch.tensor([[0.3, -2.0, 1], [5, 0, 1]]), "regression", F.mse_loss),
    ],
)
def test_each_kind_of_label_has_the_loss_of_the_library(labels, problem_type, loss):
    tokens = random_tokens(2, SEQ_LEN)
    outputs = tiny_model("classes", problem_type=problem_type)(tokens, labels=labels)
    torch.testing.assert_close(outputs.loss, loss(outputs.logits, labels))
    guessing = tiny_model("classes")
    guessing(tokens, labels=labels)
    if problem_type != "regression":  # with several labels, numbers alone do not tell it from the other two
        assert guessing.config.problem_type == problem_type


@pytest.mark.parametrize("problem_type", ["single_label_classification", "regression"])
def test_a_step_of_several_batches_has_the_mean_of_their_losses(problem_type, tmp_path):
    model, tokens = tiny_model("classes", problem_type=problem_type), random_tokens(8, SEQ_LEN)
    classes = tokens[:, 0] % NUM_LABELS
    labels = classes if problem_type.endswith("classification") else F.one_hot(classes, NUM_LABELS).float()
    rows = [{"input_ids": text, "labels": label} for text, label in zip(tokens, labels, strict=True)]
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1, "use_cpu": True}
    arguments = TrainingArguments(str(tmp_path), learning_rate=0.0, report_to=[], save_strategy="no", **options)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    assert trainer.train().training_loss == pytest.approx(model.eval()(tokens, labels=labels).loss.item(), rel=1e-5)


def learn(model, batch, steps):
    """Train on batches of (tokens, labels) of fresh seeds, then the logits and labels of a large unseen one."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for step in range(steps):
        tokens, labels = batch(32, seed=step)
        optimizer.zero_grad()
        model(tokens, labels=labels).loss.backward()
        optimizer.step()
    tokens, labels = batch(256, seed=10**6)
    with torch.no_grad():
        return model.eval()(tokens).logits, labels


def masked_copies(batch_size: int, seed: int):
    """The first token, one of 8, comes again at the end, where it is masked; noise of other tokens lies between.

    5 12 27 9 ... 30 -> 5, wanted in place of the mask 30 alone
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(8, 30, (batch_size, NUM_TO_LEARN_FROM), generator=generator)
    tokens[:, 0] = torch.randint(0, 8, (batch_size,), generator=generator)
    labels = torch.full_like(tokens, -100)
    tokens[:, -1], labels[:, -1] = 30, tokens[:, 0]
    return tokens, labels


def rare_tokens(batch_size: int, seed: int):
    """One token of three, 0, 1 or 2, stands anywhere among noise of others: it is the class."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCAB_SIZE, (batch_size, NUM_TO_LEARN_FROM), generator=generator)
    labels = torch.randint(0, NUM_LABELS, (batch_size,), generator=generator)
    places = torch.randint(0, NUM_TO_LEARN_FROM, (batch_size,), generator=generator)
    tokens[torch.arange(batch_size), places] = labels
    return tokens, labels


@every_mixer
def test_a_masked_token_is_learnt_from_a_far_one(mixer):
    model = tiny_model("masked", mixer, initializer_range=0.02)
    logits, labels = learn(model, masked_copies, steps=60)
    assert (logits[:, -1].argmax(-1) == labels[:, -1]).float().mean() > 0.9  # chance is 1 / 8


@every_mixer
@pytest.mark.parametrize("head", ["classes", "causal classes"])
def test_a_class_is_learnt_from_a_rare_token_anywhere(mixer, head):
    model = tiny_model(head, mixer, initializer_range=0.02, decay="head" if head == "causal classes" else None)
    logits, labels = learn(model, rare_tokens, steps=60)
    assert (logits.argmax(-1) == labels).float().mean() > 0.9  # chance is 1 / 3


def test_the_collator_of_the_library_masks_bytes():
    from transformers import DataCollatorForLanguageModeling

    from splatflow.training.text import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    model = SplatFlowForMaskedLM(SplatFlowConfig(vocab_size=len(tokenizer), hidden_size=32, causal=False, decay=None))
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5, seed=5)
    batch = collator([tokenizer("splats"), tokenizer("tokens meet at splats")])
    assert (batch["input_ids"] == tokenizer.mask_token_id).any()
    assert batch["attention_mask"].sum() == 27
    loss = model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("model_class", "causal", "message"),
    [
        (SplatFlowForMaskedLM, True, "causal is True, expected False"),
        (SplatFlowForCausalLM, False, "causal is False, expected True"),
    ],
)
def test_a_head_that_a_mask_makes_pointless_is_refused(model_class, causal, message):
    with pytest.raises(ValueError, match=message):
        model_class(tiny_config(causal=causal))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "head"}, "decay is 'head', expected None with causal=False"),
        ({"decay": None, "window_size": 4}, "window_size is 4, expected 0 with causal=False"),
        ({}, "decay is 'head', expected None with causal=False"),
    ],
)
def test_a_configuration_says_what_needs_an_order(options, message):
    with pytest.raises(StrictDataclassError, match=f"(?s){message}"):
        SplatFlowConfig(causal=False, **options)


def test_a_model_without_order_has_no_cache():
    model, tokens = SplatFlowModel(tiny_config()).eval(), random_tokens(1, 5)
    assert model(tokens).past_key_values is None
    for options, given in (
        ({"use_cache": True}, "use_cache=True"),
        ({"past_key_values": SplatFlowCache(2)}, "past_key_values"),
    ):
        with pytest.raises(ValueError, match=f"{given} given, expected no cache with causal=False"):
            model(tokens, **options)


@every_head
def test_what_a_head_does_not_take_is_refused(head):
    with pytest.raises(TypeError, match="position_ids given"):
        tiny_model(head)(random_tokens(1, 5), position_ids=torch.arange(5))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 4\)"):
        tiny_model(head)(random_tokens(1, 5), torch.ones(1, 4))
