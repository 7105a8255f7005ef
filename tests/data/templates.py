"""Chat templates of many kinds. What a model learns to write in a turn stands between LEARNT and END, which `plain`
removes: rendering the template with them says what should be learnt."""

LEARNT, END = "\ue000", "\ue001"
_HEADER = "{{ '<|im_start|>' + m.role + '\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_USER = _HEADER + "{{ m.content + eos_token + '\n' }}"
_ANSWER = _HEADER + f"{{{{ '{LEARNT}' + m.content + eos_token + '{END}\n' }}}}"


def _turns(answer: str, other: str = _USER) -> str:
    return (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}"
        + other
        + "{% endif %}{% endfor %}"
    )


# leaves out the thoughts of turns before the last question, and opens an empty one in a last turn without (Qwen3)
THINKING = """
{%- if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ eos_token + '\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- set content = m.content %}{% set thought = m.reasoning_content or '' %}
    {%- if '</think>' in content and not thought %}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
        {%- set content = content.split('</think>')[-1] %}
    {%- endif %}
    {{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' }}
    {%- if m.role != 'assistant' %}
        {{- content + eos_token + '\n' }}
    {%- else %}
        {%- if loop.index0 > ns.last and thought %}
            {{- 'LEARNT<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- elif loop.index0 > ns.last and loop.last %}
            {{- '<think>\n\n</think>\n\nLEARNT' + content.lstrip('\n') }}
        {%- else %}
            {{- 'LEARNT' + content }}
        {%- endif %}
        {%- for call in m.tool_calls or [] %}
            {{- '\n' if content or not loop.first }}{{ '<tool_call>\n' + call.function | tojson + '\n</tool_call>' }}
        {%- endfor %}
        {{- eos_token + 'END\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}""".replace("LEARNT", LEARNT).replace("END", END)
# opens a thought in the generation prompt, which a finished turn does not have (DeepSeek R1)
OPENED = (
    _turns(_ANSWER.replace("m.content", "m.content.split('</think>')[-1]"))
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
PLAIN = _turns(_ANSWER) + _PROMPT
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant' + eos_token + '\n' }}"
    "{% endif %}" + PLAIN
)
DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + eos_token + '\n' }}" + PLAIN
SYSTEM_DROPPING = _turns(_ANSWER, "{% if m.role != 'system' %}" + _USER + "{% endif %}") + _PROMPT
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + PLAIN
CAPITALS = (
    _turns(
        f"{{{{ 'ASSISTANT:{LEARNT} ' + m.content + eos_token + '{END}' }}}}",
        "{{ m.role | upper + ': ' + m.content + '\n' }}",
    )
    + "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TRIMMING = PLAIN.replace("m.content", "m.content | trim")
MARKED = (
    _turns(
        _HEADER + f"{{{{ '{LEARNT}' }}}}{{% generation %}}{{{{ m.content }}}}{{% endgeneration %}}"
        f"{{{{ eos_token + '{END}\n' }}}}"
    )
    + _PROMPT
)
# folds the system turn into the first question; its generation prompt is empty (Llama 2)
FOLDED = _turns(
    f"{{{{ '{LEARNT} ' + m.content | trim + ' ' + eos_token + '{END}' }}}}",
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n' %}"
    "{% else %}{{ '[INST] ' + ns.system + m.content | trim + ' [/INST]' }}{% set ns.system = '' %}{% endif %}",
)
FOLDED = "{% set ns = namespace(system='') %}" + FOLDED
# ends turns with a line break, and its generation prompt with a space
UNTERMINATED = (
    _turns(f"{{{{ m.role + ': {LEARNT}' + m.content + '\n{END}' }}}}", "{{ m.role + ': ' + m.content + '\n' }}")
    + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEMPLATES = {
    "thinking": THINKING,
    "opened thought": OPENED,
    "default system": DEFAULT_SYSTEM,
    "dated": DATED,
    "system-dropping": SYSTEM_DROPPING,
    "no system": NO_SYSTEM,
    "capitals": CAPITALS,
    "trimming": TRIMMING,
    "marked": MARKED,
    "folded": FOLDED,
    "unterminated": UNTERMINATED,
}


def plain(template: str) -> str:
    """The template as its users have it."""
    return template.replace(LEARNT, "").replace(END, "")
