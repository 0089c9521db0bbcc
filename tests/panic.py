"""What a library written in Rust raises where it panics."""


class Panic(BaseException):
    """As PyO3's own, which is no Exception either."""
