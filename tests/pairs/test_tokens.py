"""From examples to ids, derived by hand (`ids`: one token a character)."""

import itertools

import pytest
from transformers import PreTrainedTokenizerFast

from dpo.base.errors import InvalidValue
from dpo.encode import encoding
from dpo.encode.encoder import Encoder, ids_encoder, text_encoder
from dpo.pairs.tokens import Limits, cut_prompt, limits_of, tokenize
from dpo.sources.formats.example import Example
from tests.support.data_fixtures import BOS, EOS, QZ, VOCAB_SIZE, TinyModelConfig, ids, make_tokenizer

NO_LIMITS = Limits(None, None, VOCAB_SIZE, None, False)
TEXTS = text_encoder(make_tokenizer())


def pair(prompt, chosen, rejected) -> Example:
    return Example(prompt, (chosen, rejected), ((0, 1),))


def limits(max_length=None, max_prompt_length=None, positions=None, learned=False) -> Limits:
    return Limits(max_length, max_prompt_length, VOCAB_SIZE, positions, learned)


def encode(example: Example, encoder: Encoder) -> tuple[list[int], list[list[int]]]:
    """The ids of prompt and completions."""
    encoded = encoding.encode(example, encoder)
    return encoded.prompt_ids, [completion.ids for completion in encoded.completions]


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_text(bos, eos):
    """BOS as the tokenizer adds it, no EOS after the prompt, one EOS after each completion."""
    prompt, completions = encode(pair("ab", " c", "d e"), text_encoder(make_tokenizer(bos, eos)))
    assert prompt == [BOS] * bos + ids("ab")
    assert completions == [[*ids(" c"), EOS], [*ids("d e"), EOS]]


@pytest.mark.parametrize("eos", [False, True])
def test_an_eos_that_the_text_has_stays_once(eos):
    """Only the EOS that the tokenizer adds is removed from the prompt; none is added where one stands at the end."""
    prompt, completions = encode(pair("a</s>", "c</s>", "d"), text_encoder(make_tokenizer(eos=eos)))
    assert prompt == [*ids("a"), EOS]
    assert completions == [[*ids("c"), EOS], [*ids("d"), EOS]]


def test_no_token_has_characters_of_prompt_and_completion():
    """QZ is one token, Q and Z apart are two."""
    tokenized = tokenize(pair("aQ", "Zb", "QZ"), TEXTS, NO_LIMITS)
    assert tokenized.prompt_ids == ids("aQ") and tokenized.completion_ids == ([*ids("Zb"), EOS], [QZ, EOS])
    assert tokenized.boundary_merges == 1


def test_empty_prompt():
    """With a BOS there is a token to predict the answer from, without there is none."""
    with_bos = text_encoder(make_tokenizer(bos=True))
    assert tokenize(pair("", "a", "b"), with_bos, NO_LIMITS).prompt_ids == [BOS]
    with pytest.raises(ValueError, match="the prompt has no token"):
        tokenize(pair("", "a", "b"), TEXTS, NO_LIMITS)


# --- chat ---------------------------------------------------------------------------------------------------------

USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "S"}
ANSWERS = tuple({"role": "assistant", "content": text} for text in ("Yes", "No"))


def chat(template: str, *prompt):
    return encode(pair(prompt, *ANSWERS), text_encoder(make_tokenizer(bos=True, chat_template=template)))


def test_chat_of_several_turns():
    """The template of the fixture: [role]content and EOS a message; nothing is added to what it writes."""
    tokenizer = make_tokenizer(bos=True, eos=True)
    prompt, completions = encode(pair((SYSTEM, USER, ANSWERS[0], USER), *ANSWERS), text_encoder(tokenizer))
    turns = ("[system]S", "[user]Hi", "[assistant]Yes", "[user]Hi")
    assert prompt == [*itertools.chain(*([*ids(turn), EOS] for turn in turns)), *ids("[assistant]")]
    assert completions == [[*ids("Yes"), EOS], [*ids("No"), EOS]]


LOOP = "{% for m in messages %}%s{% endfor %}{% if add_generation_prompt %}>{% endif %}"


def test_chat_is_cut_after_the_first_eos_and_gets_one_where_there_is_none():
    """`>Hi</s>\\n` a message: the line feed after the answer's EOS is no part of it. `>Hi;`: EOS is appended."""
    prompt, completions = chat(LOOP.replace("%s", ">{{ m.content }}</s>\n"), USER)
    assert prompt == [*ids(">Hi"), EOS, *ids("\n>")]
    assert completions == [[*ids("Yes"), EOS], [*ids("No"), EOS]]
    prompt, completions = chat(LOOP.replace("%s", ">{{ m.content }};"), USER)
    assert prompt == ids(">Hi;>") and completions == [[*ids("Yes;"), EOS], [*ids("No;"), EOS]]


@pytest.mark.parametrize(
    ("template", "what"),
    [
        # the template writes the number of messages first, so the prompt's text changes with the answer
        (
            "{{ messages | length }}" + LOOP.replace("%s", ">{{ m.content }}"),
            "chat template writes '1>Hi>' for the prompt alone, after '', but '2>Hi>Yes' there for prompt and answer",
        ),
        (None, "messages need a chat template, which the tokenizer lacks"),
        ("{{ raise_exception('roles must alternate') }}", "chat template refuses the messages: roles must alternate"),
        ("{% for %}", "chat template refuses the messages: "),
        ("{{ raise_exception('x' * 9999) }}", f"refuses the messages: {'x' * 300}; valid: "),
    ],
)
def test_chat_template_that_does_not_serve(template, what):
    with pytest.raises(ValueError) as error:
        chat(template, USER)
    assert what in str(error.value)


def test_a_tokenizer_that_fails_is_the_rows_error():
    """Else a worker ends with a traceback that names no line."""

    class Failing(PreTrainedTokenizerFast):
        def __call__(self, text, **_):
            raise ValueError("no such byte")

    tokenizer = Failing(tokenizer_object=make_tokenizer().backend_tokenizer, eos_token="</s>")
    with pytest.raises(InvalidValue, match=r"^the tokenizer refuses 'Hi': no such byte$"):
        encode(pair("Hi", "Yes", "No"), Encoder(tokenizer, None, (EOS,)))


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_ids_stay_as_they_are():
    encoder = ids_encoder(TinyModelConfig(eos_token_id=[EOS, 7]))
    tokenized = tokenize(Example((5, 6), ((8, 9), (8, EOS), (9, 7)), ((0, 1), (2, 0))), encoder, NO_LIMITS)
    assert tokenized.prompt_ids == [5, 6] and tokenized.completion_ids == ([8, 9], [8, EOS], [9, 7])
    assert (tokenized.kind, tokenized.boundary_merges) == ("", 0)


@pytest.mark.parametrize("example", [pair((5, 100), (6,), (7,)), pair((5,), (6,), (7, 2**40)), pair((5,), (-1,), (7,))])
def test_ids_outside_of_the_vocabulary(example):
    wrong = next(i for part in (example.prompt, *example.completions) for i in part if not 0 <= i < 100)
    with pytest.raises(ValueError, match=f"^token id {wrong} is outside of the model's vocabulary; valid: 0 to 99, as"):
        tokenize(example, ids_encoder(TinyModelConfig()), NO_LIMITS)


# --- lengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "longest", "kept"),
    [
        ([5, 6, 7], None, [5, 6, 7]),
        ([5, 6, 7], 3, [5, 6, 7]),
        ([5, 6, 7, 8], 3, [6, 7, 8]),
        ([BOS, 6, 7, 8], 3, [BOS, 7, 8]),  # BOS stays first and counts
        ([BOS, 6, 7, 8], 1, [BOS]),
        ([5, BOS, 7, 8], 2, [7, 8]),  # a BOS inside is a token like others
        ([5, 6], 1, [6]),
    ],
)
def test_cut_prompt(given, longest, kept):
    assert cut_prompt(given, longest, BOS) == kept


@pytest.mark.parametrize(
    ("longest", "longest_prompt", "prompt", "completions", "cut"),
    [
        # "abcd" has 4 tokens; "xyz" and EOS 4, "u" and EOS 2
        (None, None, ids("abcd"), [[*ids("xyz"), EOS], [*ids("u"), EOS]], 0),
        (8, None, ids("abcd"), [[*ids("xyz"), EOS], [*ids("u"), EOS]], 0),
        (7, None, ids("abcd"), [ids("xyz"), [*ids("u"), EOS]], 1),  # a cut completion ends without EOS
        (5, None, ids("abcd"), [ids("x"), ids("u")], 2),
        # the prompt is cut also where the sum would fit
        (99, 2, ids("cd"), [[*ids("xyz"), EOS], [*ids("u"), EOS]], 0),
        (4, 2, ids("cd"), [ids("xy"), [*ids("u"), EOS]], 1),
    ],
)
def test_lengths(longest, longest_prompt, prompt, completions, cut):
    tokenized = tokenize(pair("abcd", "xyz", "u"), TEXTS, limits(longest, longest_prompt))
    assert (tokenized.prompt_ids, list(tokenized.completion_ids)) == (prompt, completions)
    assert tokenized.full_prompt_ids == ids("abcd")
    assert (tokenized.prompt_truncated, tokenized.completions_truncated) == (longest_prompt is not None, cut)


def test_counts_are_over_completions_in_a_kept_pair():
    """Completion 2 is in no pair, the pair of 3 and 4 is dropped (both begin with v): of five 0 and 1 count."""
    example = Example("ab", ("xy", "uv", "zz", "vv", "vw"), ((0, 1), (0, 1), (3, 4)))
    tokenized = tokenize(example, TEXTS, limits(3))
    assert tokenized.dropped == ("identical_after_truncation",)
    assert tokenized.pairs == ((0, 1), (0, 1)) and tokenized.completions_truncated == 2


@pytest.mark.parametrize(("length", "over"), [(6, 0), (7, 1)])
def test_longer_than_the_models_positions(length, over):
    """Prompt 2, completion n + EOS: a warning counts where positions are rotary, an error says so where learned."""
    example = pair("ab", "x" * (length - 3), "u")
    assert tokenize(example, TEXTS, limits(positions=6)).over_positions == over
    if over:
        with pytest.raises(ValueError, match=r"have 7 tokens, the model's positions end at 6; valid: data\."):
            tokenize(example, TEXTS, limits(positions=6, learned=True))
    else:
        assert tokenize(example, TEXTS, limits(positions=6, learned=True)).over_positions == 0


def test_rope_that_depends_on_the_row_is_hard_beyond_its_first_range():
    """longrope (Phi-3-128k) switches factors beyond 4,096 positions, dynamic RoPE beyond max_position_embeddings."""
    transformers = pytest.importorskip("transformers")
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096}
    longrope |= {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "factor": 32.0}
    elastic = transformers.LlamaConfig(head_dim=32, max_position_embeddings=131072, rope_parameters=longrope)
    assert limits_of(9, 5, elastic) == Limits(9, 5, 32000, 4096, True)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert limits_of(9, 5, transformers.LlamaConfig(rope_parameters=dynamic)) == Limits(9, 5, 32000, 2048, True)


def test_learned_positions_are_those_of_a_config_without_rope():
    transformers = pytest.importorskip("transformers")
    learned = {name: transformers.AutoConfig.for_model(name) for name in ("gpt2", "gpt_neo", "opt")}
    rotary = {name: transformers.AutoConfig.for_model(name) for name in ("llama", "qwen3", "mistral", "gpt_neox")}
    assert all(limits_of(1, 1, config).positions_are_hard for config in learned.values())
    assert not any(limits_of(1, 1, config).positions_are_hard for config in rotary.values())
    assert limits_of(9, 5, learned["gpt2"]) == Limits(9, 5, 50257, 1024, True)


# --- pairs without a preference -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rejected", "longest", "reason"),
    [
        ("a", "b", None, None),
        ("a", " \n", None, "empty"),  # nothing left after strip
        ("", "b", None, "empty"),
        ("</s>", "b", None, "empty"),  # nothing but EOS
        ("</s></s>", "b", None, "empty"),
        ("a", "a", None, "identical"),
        ("a", "a</s>", None, "identical"),  # equal ids, though not equal texts
        ("abc", "abd", 4, "identical_after_truncation"),  # prompt 2, room 2: both "ab"
        ("abc", "abd", 5, None),
        ("a", "b", 2, "no_room"),
        # where several apply the first counts: empty, identical, no_room, identical_after_truncation
        ("", "", None, "empty"),
        ("", "", 2, "empty"),
        ("a", "a", 2, "identical"),
        ("ab", "ac", 2, "no_room"),
    ],
)
def test_reason(chosen, rejected, longest, reason):
    tokenized = tokenize(pair("pp", chosen, rejected), TEXTS, limits(longest))
    assert tokenized.dropped == (() if reason is None else (reason,))
    assert tokenized.pairs == (((0, 1),) if reason is None else ())


def test_reasons_are_per_pair_after_those_of_the_row():
    example = Example("p", ("a", "", "a", "b"), ((0, 1), (0, 2), (0, 3), (3, 1)), ("tie", "tie"))
    tokenized = tokenize(example, TEXTS, NO_LIMITS)
    assert tokenized.pairs == ((0, 3),)
    assert tokenized.dropped == ("tie", "tie", "empty", "identical", "empty")


def test_empty_answer_of_a_chat():
    nothing = {"role": "assistant", "content": " "}
    assert tokenize(pair((USER,), ANSWERS[0], nothing), TEXTS, NO_LIMITS).dropped == ("empty",)


def test_only_eos_of_ids():
    example = Example((5,), ((EOS,), (), (6, EOS)), ((0, 2), (2, 1)))
    assert tokenize(example, ids_encoder(TinyModelConfig()), NO_LIMITS).dropped == ("empty", "empty")
    assert tokenize(example, ids_encoder(TinyModelConfig(eos_token_id=None)), NO_LIMITS).dropped == ("empty",)
