"""Messages that a chat template leaves out are counted: a preference was given with them."""

import pytest

from dpo.config import SourceConfig
from dpo.encode.unwritten import leaves_out
from dpo.pairs.prepare import prepare_data
from tests.support.data_fixtures import TinyModelConfig, make_config, make_tokenizer, write_jsonl

pytest_plugins = ["tests.support.data_plugin"]
pytestmark = pytest.mark.usefixtures("hf_cache")
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "look_up"}}]}
USER, TOOL, ANSWER = (
    {"role": role, "content": text} for role, text in (("user", "Hi"), ("tool", "3 sheep"), ("assistant", "ok"))
)
USERS_ALONE = (
    "{% for m in messages if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("messages", "text", "expected"),
    [
        ([USER], "<user>Hi</s>", False),
        ([USER], "<user></s>", True),
        ([USER | {"content": " Hi\n  you "}], "<user>Hi you</s>", False),
        ([TOOL], "<tool>3 sheep", False),
        ([TOOL], "<tool>", True),
        ([CALL], "[call look_up]", False),
        ([CALL], "<assistant></s>", True),
        ([ANSWER | {"content": "<think>long</think>\n\nok"}], "<assistant>ok</s>", False),
        ([ANSWER | {"content": "<think>long</think>\n\nok"}], "<assistant></s>", True),
        ([USER | {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "<user>ab", False),
        ([{"role": "assistant", "content": None}], "", False),
    ],
)
def test_what_a_text_lacks(messages, text, expected):
    assert leaves_out(messages, text) is expected


def test_rows_are_counted(tmp_path):
    """Row 1: the template skips the tool's answer. Row 2: it writes all."""
    make_tokenizer(chat_template=USERS_ALONE).save_pretrained(tmp_path / "t")
    answers = {"chosen": [ANSWER], "rejected": [ANSWER | {"content": "no"}]}
    rows = [{"prompt": [USER, CALL, TOOL], **answers}, {"prompt": [USER], **answers}]
    source = SourceConfig(write_jsonl(tmp_path / "a.jsonl", rows))
    report = prepare_data(make_config(source, tokenizer=str(tmp_path / "t")), TinyModelConfig()).report
    assert report.sources[0].unwritten == 1
    told = "  1 rows have a message or a tool call that the chat template leaves out: a WARNING"
    assert told in report.lines()
