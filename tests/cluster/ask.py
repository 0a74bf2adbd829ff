"""ask.py URL MODEL: the real openai client against the router, streaming and not, right and wrong."""

import sys

import openai

url, model = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
question = [{"role": "user", "content": "What is 47 + 85?"}]

assert model in [entry.id for entry in client.models.list()], "the model is listed"

answer = client.chat.completions.create(model=model, messages=question, temperature=0)
choice = answer.choices[0]
assert "132" in choice.message.content, answer
assert "<think>" not in choice.message.content and choice.message.reasoning_content, answer
assert choice.finish_reason == "stop", answer
usage = answer.usage
assert usage.prompt_tokens > 0 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, answer

said, thought, counted = "", "", None
stream = client.chat.completions.create(
    model=model, messages=question, temperature=0, stream=True, stream_options={"include_usage": True}
)
for chunk in stream:
    counted = chunk.usage or counted
    for part in chunk.choices:
        said += part.delta.content or ""
        thought += getattr(part.delta, "reasoning_content", None) or ""
assert said == choice.message.content, (said, choice.message.content)
assert thought == choice.message.reasoning_content, (thought, choice.message.reasoning_content)
assert counted.completion_tokens == usage.completion_tokens, (counted, usage)

several = client.chat.completions.create(model=model, messages=question, n=3, temperature=0.8, seed=7, logprobs=True)
assert [choice.index for choice in several.choices] == [0, 1, 2], several
assert all(choice.logprobs.content for choice in several.choices), several
again = client.chat.completions.create(model=model, messages=question, n=3, temperature=0.8, seed=7, logprobs=True)
assert [c.message.content for c in again.choices] == [c.message.content for c in several.choices], "a seed repeats"

text = client.completions.create(model=model, prompt="318+475=", max_tokens=4, temperature=0, echo=True, logprobs=2)
assert text.choices[0].text.startswith("318+475="), text
assert text.choices[0].logprobs.tokens, text

for wrong, expected in [
    (dict(model="nobody", messages=question), openai.NotFoundError),
    (dict(model=model, messages=question, temperature=-1), openai.BadRequestError),
    (dict(model=model, messages=question, response_format={"type": "json_object"}), openai.BadRequestError),
]:
    try:
        client.chat.completions.create(**wrong)
    except expected as error:
        assert error.body["message"], error
    else:
        raise AssertionError(f"{wrong} was answered")
