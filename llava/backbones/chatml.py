"""ChatML: the words that Qwen's, InternVL's and SmolLM's models are asked with."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from llava.conversation import Template

CHATML = Template(
    system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
    user="<|im_start|>user\n",
    assistant="<|im_end|>\n<|im_start|>assistant\n",
    lead="",
    end="<|im_end|>",
    placeholder="<|image_pad|>",
    before="<|vision_start|>",
    after="<|vision_end|>",
    gap="\n",
)
PROBE = "What is asked here?"


def own_words(tokenizer: PreTrainedTokenizerBase, template: Template) -> Template:
    """Return a ChatML template with the system prompt, and with what stands before an answer, of the chat template that
    lies beside the tokenizer; as it is where none does: releases of one architecture differ in them. Raises ValueError
    for a chat template that is not ChatML, or that has every answer thought about first."""
    if not tokenizer.chat_template:
        return template
    asked = [{"role": "user", "content": PROBE}]
    # Those that know enable_thinking close the thought at once, as a task's answers have none.
    try:
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    except Exception as error:  # jinja's own
        raise ValueError(f"its chat template cannot be followed ({error}); take an Instruct checkpoint") from error
    before, _, behind = text.partition(PROBE)
    if not before.endswith(template.user) or not behind.startswith(CHATML.assistant):
        raise ValueError(f"its chat template asks {text!r}, which is not ChatML; take an Instruct checkpoint")
    if behind.count("<think>") != behind.count("</think>"):
        raise ValueError("its chat template has every answer thought about first; take an Instruct checkpoint")
    return replace(template, system=before.removesuffix(template.user), assistant=behind)
