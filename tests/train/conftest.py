from tests.small_fonts import cache, fonts, shared_cache, tiny  # noqa: F401
