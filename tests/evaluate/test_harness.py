"""The model for lm-evaluation-harness, through its evaluator and as a user types the command."""

import functools
import importlib.metadata
import json
import pathlib
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

pytest.importorskip("lm_eval", reason="pip install 'restkv-jax[harness]'")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

import restkv_jax as rk
from restkv_jax.commands import lm_eval as lm_eval_command
from restkv_jax.commands.cli import main
from restkv_jax.evaluate.harness import fitting
from restkv_jax.evaluate.harness import model as harness
from restkv_jax.evaluate.harness.model import EMBEDDED, RestKV
from restkv_jax.evaluate.harness.model_args import parse_model_args
from restkv_jax.generation.sampling import TokenScores
from restkv_jax.models import logits, read

ROOT = pathlib.Path(__file__).parents[2]
SENTENCE = "The sky is blue. Here we go. There and back again. "
PROMPTS = [SENTENCE * count + f"No. {10**i}:" for i, count in enumerate((3, 1, 3, 1, 3))]
EVICTED = {"method": "snapkv", "budget": 40, "window": 8}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return str(tiny.write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def evicted(directory):
    return RestKV(pretrained=directory, batch_size=4, **EVICTED)


@pytest.fixture(scope="module")
def full(directory):
    return RestKV(pretrained=directory, batch_size=4, method="full")


def ask(kind, *arguments):
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def generate(model, prompts=PROMPTS, **options):
    return model.generate_until(ask("generate_until", *((p, dict(options)) for p in prompts)), disable_tqdm=True)


def score(model, *pairs):
    return model.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)


def plain(model, context, continuation):
    """Log-probabilities of the continuation's tokens in one forward pass, and whether each is the best."""
    tokens = jnp.asarray([context + continuation])
    scores = logits(model.model, model.params, read(model.model, model.params, tokens)[0])[0]
    scores = jax.nn.log_softmax(scores[len(context) - 1 : -1])
    chosen = np.asarray(continuation)
    return np.asarray(scores[np.arange(len(chosen)), chosen]), np.asarray(scores.argmax(-1)) == chosen


def write_task(folder, name, data, **settings):
    """A task with its data in a folder; without data, the file that it names is missing."""
    if data is not None:
        (folder / f"{name}.json").write_text(json.dumps(data))
    files = {"data_files": {"test": str(folder / f"{name}.json")}, "cache_dir": str(folder / "cache")}
    fields = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(json.dumps(fields | {"doc_to_text": "{{text}}"} | settings))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    completion = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 20, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
    write_task(folder, "completion", [{"text": p, "answer": "no"} for p in PROMPTS[:3]], **completion)
    write_task(folder, "choice", [{"text": p, "choices": ["a", "bc"], "label": 0} for p in PROMPTS[:2]], **choice)
    write_task(folder, "unreachable", None, **completion)
    group = {"group": "all_three", "task": ["completion", "choice", "unreachable"]}
    (folder / "all_three.yaml").write_text(json.dumps(group))
    return folder


@pytest.mark.slow
def test_evaluator_runs_generation_and_multiple_choice(directory, tasks, evicted):
    results = lm_eval.simple_evaluate(
        model="restkv",
        model_args={"pretrained": directory} | EVICTED,
        batch_size=4,
        tasks=["completion", "choice"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    config = results["config"]
    assert config["model_num_parameters"] == sum(x.size for x in jax.tree.leaves(evicted.params))
    assert (config["model_dtype"], config["model_sha"]) == ("float32", "") and len(config["model_checksum"]) == 16
    json.dumps(evicted.get_model_info())
    assert results["results"]["completion"]["exact_match,none"] == 0
    assert 0 <= results["results"]["choice"]["acc,none"] <= 1
    said = [sample["resps"][0][0] for sample in results["samples"]["completion"]]
    assert said == generate(evicted, PROMPTS[:3], until=["\n"], max_gen_toks=20)
    pairs = [(prompt, f" {choice}") for prompt in PROMPTS[:2] for choice in ("a", "bc")]
    scored = [resp[0] for sample in results["samples"]["choice"] for resp in sample["resps"]]
    assert [tuple(one) for one in scored] == score(evicted, *pairs)


def test_generated_text_is_what_generate_gives(evicted):
    tokens = evicted.tok_encode(PROMPTS[0])
    policy = rk.snapkv(budget=40, window=8)
    out = rk.generate(evicted.model, evicted.params, [tokens], policy=policy, max_new_tokens=20)
    expected = evicted.tokenizer.decode(np.asarray(out.tokens[0, : out.lengths[0]]), skip_special_tokens=True)
    assert generate(evicted, PROMPTS[:1], max_gen_toks=20) == [expected]


@pytest.mark.slow
def test_the_cache_may_be_quantised(directory, evicted):
    how = "int4(group_size=16,residual=8)"
    model = RestKV(pretrained=directory, batch_size=4, **EVICTED, cache_dtype=how.replace(",", ";"))
    tokens, policy = evicted.tok_encode(PROMPTS[0]), rk.snapkv(budget=40, window=8)
    out = rk.generate(model.model, model.params, [tokens], policy=policy, max_new_tokens=20, cache_dtype=how)
    expected = model.tokenizer.decode(np.asarray(out.tokens[0, : out.lengths[0]]), skip_special_tokens=True)
    assert generate(model, PROMPTS[:1], max_gen_toks=20) == [expected]
    (quantised, _), (as_it_is, _) = (score(x, (PROMPTS[0], " yes"))[0] for x in (model, evicted))
    assert quantised != as_it_is and quantised == pytest.approx(as_it_is, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["uniform", "model"])
def test_batches_give_what_each_prompt_gives_alone(directory, allocation):
    args = {"pretrained": directory, "method": "restkv", "budget": "20%", "window": 8, "allocation": allocation}
    several, one = RestKV(**args, batch_size=4), RestKV(**args)
    assert generate(several, max_gen_toks=20) == generate(one, max_gen_toks=20)
    pairs = [(prompt, " yes" * (1 + i % 2)) for i, prompt in enumerate(PROMPTS)]
    together, alone = score(several, *pairs), score(one, *pairs)
    np.testing.assert_allclose([x for x, _ in together], [x for x, _ in alone], atol=1e-3)
    assert [x for _, x in together] == [x for _, x in alone]


def test_stop_strings_cut_and_end_generation(evicted, monkeypatch):
    whole = generate(evicted, PROMPTS[:1], max_gen_toks=200)[0]
    stop = whole[5:7]
    blocks = []

    def counted(*args, **options):
        for block in stream_blocks(*args, **options):
            blocks.append(block)
            yield block

    stream_blocks = harness.stream_blocks
    monkeypatch.setattr(harness, "stream_blocks", counted)
    assert generate(evicted, PROMPTS[:1], until=["never", stop], max_gen_toks=200) == [whole.split(stop)[0]]
    assert len(blocks) == 2, "the first token, and one block"
    assert generate(evicted, PROMPTS[:1], until=stop, max_gen_toks=200) == [whole.split(stop)[0]]


def test_end_tokens_end_a_text(evicted):
    row = np.array([*evicted.tokenizer.encode("ab"), evicted.eot_token_id, *evicted.tokenizer.encode("c")])
    assert evicted._cut(row, []) == ("ab", True)
    assert evicted._cut(row[:2], []) == ("ab", False)
    assert evicted._cut(np.array([*row[:2], 1, row[0]]), ["<s>"]) == ("ab", True)


def test_full_cache_scores_as_one_forward_pass(full):
    context, continuation = PROMPTS[1], " Here we go."
    ((total, is_greedy),) = score(full, (context, continuation))
    expected, best = plain(full, full.tok_encode(context), full.tok_encode(continuation))
    assert total == pytest.approx(expected.sum(), abs=1e-3)
    assert is_greedy == best.all()
    greedy = generate(full, [context], max_gen_toks=1)[0]
    if greedy:
        assert score(full, (context, greedy))[0][1]


def test_text_without_context_follows_the_prefix_token(full):
    ((total, _),) = score(full, ("", "There"))
    assert total == pytest.approx(plain(full, [full.prefix_token_id], full.tok_encode("There"))[0].sum(), abs=1e-3)
    assert full.prefix_token_id == full.tokenizer.bos_token_id


@pytest.mark.slow
def test_evicted_scores_are_those_of_decoding_by_hand(evicted, full):
    context, continuation = PROMPTS[0], " back again"
    policy = rk.snapkv(budget=40, window=8)
    tokens = evicted.tok_encode(continuation)
    scores, cache = rk.prefill(evicted.model, evicted.params, [evicted.tok_encode(context)], policy=policy)
    expected = 0.0
    for token in tokens:
        expected += float(jax.nn.log_softmax(scores)[0, token])
        scores, cache = rk.decode_step(evicted.model, evicted.params, jnp.array([token]), cache, policy=policy)
    ((total, _),) = score(evicted, (context, continuation))
    assert total == pytest.approx(expected, abs=1e-3)
    assert abs(total - score(full, (context, continuation))[0][0]) > 1e-3


@pytest.mark.slow
def test_whole_texts_are_scored_in_windows(directory):
    model = RestKV(pretrained=directory, max_length=60, batch_size=4, **EVICTED)
    texts = [PROMPTS[1], "Short."]
    found = model.loglikelihood_rolling(ask("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True)
    for text, total in zip(texts, found, strict=True):
        tokens = model.tok_encode(text)
        expected = plain(model, [model.prefix_token_id], tokens[:60])[0].sum()
        if rest := tokens[60:]:
            expected += plain(model, tokens[len(tokens) - 61 : 60], rest)[0].sum()
        assert total == pytest.approx(expected, abs=1e-3)


def test_long_prompts_are_cut_from_the_left(directory, caplog):
    model = RestKV(pretrained=directory, max_length=100, **EVICTED)
    tail = model.tokenizer.decode(model.tok_encode(PROMPTS[0])[-80:])
    assert generate(model, PROMPTS[:1], max_gen_toks=20) == generate(model, [tail], max_gen_toks=20)
    assert "exceeds model's max length (100)" in caplog.text
    long, short = score(
        model, (PROMPTS[0], " yes"), (model.tokenizer.decode(model.tok_encode(PROMPTS[0])[-97:]), " yes")
    )
    assert long == short
    with pytest.raises(ValueError, match=r"max_gen_toks=100 leaves no room .* max_length=100"):
        generate(model, max_gen_toks=100)


@pytest.mark.slow
def test_sampling_is_seeded_and_does_not_depend_on_the_batch(directory, evicted):
    options = {"do_sample": True, "temperature": 1.5, "top_k": 50, "max_gen_toks": 12}
    prompts = [PROMPTS[0], PROMPTS[0], PROMPTS[2], PROMPTS[4]]
    drawn = generate(evicted, prompts, **options)
    assert len(set(drawn)) == 4
    assert drawn == generate(RestKV(pretrained=directory, **EVICTED), prompts, **options)
    assert drawn != generate(RestKV(pretrained=directory, seed=1, batch_size=4, **EVICTED), prompts, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported; known: until, max_gen_toks"),
        ({"do_sample": True, "top_p": 2.0}, r"top_p=2.0 must be in \(0, 1\]"),
        ({"max_gen_toks": 0}, "max_gen_toks=0 must be at least 1"),
    ],
)
def test_options_of_generation_that_have_no_effect_are_refused(evicted, options, message):
    with pytest.raises(ValueError, match=message):
        generate(evicted, **options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"method": "restk"}, "method='restk' is unknown; did you mean restkv"),
        ({"budgt": 3}, "budgt is not an option of method=restkv; did you mean budget"),
        ({"budget": "x%"}, "budget='x%' is not a budget; give a number of tokens such as 128"),
        ({"budget": 0}, "budget='0' is not a budget"),
        ({"method": "streaming_llm", "budget": 4}, "budget=4 must exceed sinks=4"),
        ({"method": "full", "budget": 64}, "budget is not an option of method=full"),
        ({"pooling": "median"}, "pooling='median' is unknown"),
        ({"batch_size": "many"}, "batch_size='many' must be an integer"),
        ({"batch_size": 2, "max_batch_size": 8}, "max_batch_size=8 bounds batch_size='auto'"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"pretrained": "no/such/place"}, "model 'no/such/place' cannot be loaded"),
    ],
)
def test_bad_model_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        RestKV(**args)


def test_batches_are_as_large_as_fit(directory, monkeypatch):
    model = RestKV(pretrained=directory, batch_size="auto:4", max_batch_size=6, **EVICTED)
    generate(model, PROMPTS[1:2], max_gen_toks=3)
    assert model.batch_sizes == {64: 6}, "8, the most on a CPU, and no more than 6"
    row = fitting.cache_bytes(fitting.cache_shapes(model.model, model.params, jnp.zeros((1, 64), int), None, rk.full()))
    row += 4 * (2 * 64 * 32 + 3 * 64 * 48 + 259)
    for free, size in ((2 * 5 * row, 4), (2 * row, 1), (0, 1), (2 * 100 * row, 8)):
        monkeypatch.setattr(fitting, "free_bytes", lambda free=free: free)
        assert fitting.fitting_batch(model.model, model.params, 64) == size


def test_many_short_continuations_share_few_programs(evicted, monkeypatch):
    shapes = []

    def scored(model, params, tokens, mask, continuation, policy, cache_dtype):
        shapes.append((tokens.shape, continuation.shape))
        return TokenScores(np.zeros(continuation.shape), np.zeros(continuation.shape, bool))

    monkeypatch.setattr(harness, "score_continuation", scored)
    assert len(score(evicted, *(("Which?" + "x" * (i % 5), "y" * (1 + i % 16)) for i in range(64)))) == 64
    assert len(shapes) == 16 and set(shapes) == {((4, 64), (4, length)) for length in (1, 4, 16)}


def test_the_harness_finds_the_model_by_its_entry_point():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    ((name, value),) = declared["lm_eval.models"].items()
    entry = importlib.metadata.EntryPoint(name, value, "lm_eval.models")
    assert name == "restkv" and entry.load() is RestKV is lm_eval.api.registry.get_model(name)


def test_unknown_tasks_are_one_line(tasks, capsys, monkeypatch):
    only_ours = functools.partial(TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval_command, "TaskManager", only_ours)
    assert main(["lm-eval", "--include_path", str(tasks), "--tasks", "choise"]) == 2
    assert capsys.readouterr().err == "restkv: error: --tasks: 'choise' is unknown; did you mean choice?\n"


@pytest.mark.parametrize("options", [["--model", "hf"], ["--config", "run.yaml"]])
def test_a_mesh_that_would_not_count_is_refused(tasks, tmp_path, capsys, options):
    config = tmp_path / "run.yaml"
    config.write_text("model: restkv\ntasks: [choice]\n")
    options = [str(config) if option == "run.yaml" else option for option in options]
    command = ["lm-eval", "run", "--include_path", str(tasks), "--tasks", "choice", "--model-parallel", "2"]
    assert main([*command, *options]) == 2
    assert "--model-parallel: only for the model restkv without --config" in capsys.readouterr().err


@pytest.mark.slow
def test_percentages_are_of_each_prompts_bucket(directory):
    model = RestKV(pretrained=directory, method="snapkv", budget="25%", batch_size=2)
    prompts = [(PROMPTS[0] * 9)[:length] for length in (70, 200)]
    said = generate(model, prompts, max_gen_toks=12)
    for text, length, answer in zip(prompts, (80, 224), said, strict=True):
        tokens = [model.tok_encode(text)]
        assert rk.bucket_length(len(tokens[0])) == length
        policy = rk.snapkv(budget=length // 4)
        out = rk.generate(model.model, model.params, tokens, policy=policy, max_new_tokens=12)
        assert answer == model.tokenizer.decode(out.tokens[0, : out.lengths[0]].tolist(), skip_special_tokens=True)


def test_a_policy_that_some_prompt_refuses_is_refused_before_anything_runs(directory):
    model = RestKV(pretrained=directory, method="streaming_llm", budget="5%")
    with pytest.raises(ValueError, match="budget=5% of 64 tokens is 3 slots: budget=3 must exceed sinks=4"):
        generate(model, [PROMPTS[0] * 9, "short"])


def test_types_that_the_harness_parses():
    parsed = parse_model_args({"budget": 64, "while_generating": True, "use_output_projection": False, "alpha": 1})
    assert parsed.policy == rk.restkv(64, while_generating=True, use_output_projection=False, alpha=1.0)


def test_chat_needs_a_template(evicted):
    with pytest.raises(ValueError, match="chat_template"):
        evicted.apply_chat_template([{"role": "user", "content": "Hello"}])


@pytest.mark.slow
def test_command_leaves_out_what_cannot_be_loaded(directory, tasks, capsys):
    args = ["--include_path", str(tasks), "--model_args", f"pretrained={directory},method=snapkv,budget=40"]
    assert main(["lm-eval", *args, "--tasks", "all_three", "--limit", "2"]) == 0
    out, err = capsys.readouterr()
    assert "restkv: warning: task unreachable is left out: FileNotFoundError" in err
    assert "|completion|" in out.replace(" ", "") and "|choice" in out.replace(" ", "")
    assert main(["lm-eval", *args, "--tasks", "unreachable"]) == 2
    assert "restkv: error: --tasks: none can be loaded: unreachable (FileNotFoundError" in capsys.readouterr().err


@pytest.mark.slow
def test_command_on_needles_with_the_embedded_model(capsys):
    args = ["--model", "restkv", "--model_args", "method=restkv,budget=20%", "--tasks", "niah_single_1", "--limit", "2"]
    assert main(["lm-eval", *args, "--metadata", '{"max_seq_lengths":[512]}', "--batch_size", "2"]) == 0
    out, _ = capsys.readouterr()
    assert EMBEDDED in out
    assert "|none|0|512||1|" in out.replace(" ", "")
