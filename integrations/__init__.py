r"""Adapters that make flowguard feel native in other libraries (``flowguard.integrations.<host>``)."""
