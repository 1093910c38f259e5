"""Chats."""

# Nemotron 3's layout (hybrid-models.md 13): always a system turn; reasoning before the last user turn is cut
CHAT_TEMPLATE = """\
{%- if tools %}{{ raise_exception("this tokenizer's chat template has no layout for tools") }}{% endif %}
{%- set thinking = enable_thinking if enable_thinking is defined else true %}
{%- set truncate = truncate_history_thinking if truncate_history_thinking is defined else true %}
{%- set turns = messages %}
{%- set system = "" %}
{%- if messages and messages[0].role == "system" %}
{%- set system = messages[0].content %}{% set turns = messages[1:] %}
{%- endif %}
{%- set last = namespace(user=-1) %}
{%- for turn in turns %}{% if turn.role == "user" %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{{- "<|im_start|>system\\n" + system + "<|im_end|>\\n" }}
{%- for turn in turns %}
{%- if turn.role not in ["user", "assistant"] %}
{{- raise_exception("unknown role " + turn.role + " in turn " + loop.index|string + "; use system (first), user or assistant") }}
{%- endif %}
{{- "<|im_start|>" + turn.role + "\\n" }}
{%- if turn.role == "assistant" %}
{%- if turn.reasoning_content and (not truncate or loop.index0 > last.user) %}
{{- "<think>\\n" + turn.reasoning_content + "\\n</think>\\n" }}
{%- else %}
{{- "<think></think>" }}
{%- endif %}
{%- endif %}
{{- turn.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- "<|im_start|>assistant\\n" + ("<think>\\n" if thinking else "<think></think>") }}
{%- endif %}"""
