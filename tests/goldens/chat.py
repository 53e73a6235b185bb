"""Makes chat.json: prompts of well-known chat templates as transformers writes and encodes them.

    python tests/goldens/chat.py        needs transformers
"""
import json
from pathlib import Path

from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
           "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"]

TEMPLATES = {
    "chatml": ("<s>", "<|im_end|>", """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""),
    "llama-2": ("<s>", "</s>", """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""),
    "zephyr": ("<s>", "</s>", """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""),
    "gemma": ("<s>", "<end_of_turn>", """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""),
    "mistral": ("<s>", "</s>", """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}

{#- This block checks for alternating user/assistant messages. #}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""),
    "phi-3": ("<s>", "<|end|>", """{% for message in messages %}{{'<|' + message['role'] + '|>' + '\n' + message['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}{{- '<|assistant|>\n' -}}{% endif %}"""),
    "qwen-3": (None, "<|im_end|>", """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '/think:' in content %}
                {%- set reasoning_content = content.split('/think:')[0].rstrip('\\n').split('think:')[-1].lstrip('\\n') %}
                {%- set content = content.split('/think:')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\nthink:\\n' + reasoning_content.strip('\\n') + '\\n/think:\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {{- tool_call | tojson }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- 'think:\\n\\n/think:\\n\\n' }}
    {%- endif %}
{%- endif %}"""),
    "generation": ("<s>", "</s>", """{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}
{{ message.content }}{{ eos_token }}
        {%- endgeneration -%}
    {% else %}
[{{ message.role | upper }}] {{ message.content }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}> {% endif %}
"""),
    "words of Python": ("<s>", "</s>", """{%- macro say(message, mark='-') %}
{{ mark }} {{ message.role.title() }}: {{ message.content }}
{% endmacro -%}
{% for message in messages %}
{%- if loop.previtem is defined and loop.previtem.role == message.role %}{% continue %}{% endif %}
{%- for key, value in message.items() %}{{ key }}={{ value | tojson }};{% endfor %}
{{ say(message) -}}
{{ message | tojson }}{{ message.get('name') }}{{ message.get('name', 'none') }}{{ loop.first }}{{ none }}
{% if loop.index > 3 %}{% break %}{% endif %}
{{ message.content.find('é') }} {{ message.content.rfind('i') }} {{ message.content.count('i') }} {{ message.content[-3:] }}
{{ message.content.replace('i', 'I') }} {{ message.content.upper() }} {{ ' / '.join(message.content.split()) }} {{ message.content | length }}
{% endfor %}
{{ {'b': [1, 2.5, true, none, 'é"'], 'a': {}} | tojson }} {{ {'b': [1], 'a': {'c': []}} | tojson(indent=2) }}
{{- documents is none }} {{ 'x' in messages[0] }} {{ messages | map(attribute='role') | join(',') }} {{ missing }}|
"""),
}

CONVERSATIONS = [
    [("user", "Hello, how are you?")],
    [("system", "You are brief."), ("user", "  Is 1 < 2?\n"), ("assistant", "Yes."), ("user", "a | b, [x] & \"naïve\" é日本 🦀")],
    [("user", "One"), ("assistant", "think:\nhm\n/think:\n\n  Two  "), ("user", "Three"), ("assistant", "Fo")],
    [("user", "Hi"), ("user", "Are you there?")],
    [("assistant", "I begin.")],
    [("system", "Only a system.")],
    [("user", "")],
]


def main():
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(HERE / "gpt2-tiny/tokenizer.json"))
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    cases = []
    for name, (bos, eos, template) in TEMPLATES.items():
        tokenizer.bos_token, tokenizer.eos_token = bos, eos
        tokenizer.chat_template = template
        for turns in CONVERSATIONS:
            messages = [{"role": role, "content": content} for role, content in turns]
            case = {"template": name, "messages": messages}
            try:
                told = {"add_generation_prompt": True}
                case["text"] = tokenizer.apply_chat_template(messages, tokenize=False, **told)
                case["ids"] = tokenizer.apply_chat_template(messages, return_dict=False, **told)
            except Exception as error:
                case["error"] = str(error)
            cases.append(case)
    templates = {name: {"bos_token": bos, "eos_token": eos, "chat_template": template}
                 for name, (bos, eos, template) in TEMPLATES.items()}
    special = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    golden = {"special": special, "templates": templates, "cases": cases}
    (HERE / "chat.json").write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
