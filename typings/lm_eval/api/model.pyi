"""The lm-evaluation-harness, of the extra `lm-eval`: looked up when it runs."""

class TemplateLM:
    def __init__(self) -> None: ...
