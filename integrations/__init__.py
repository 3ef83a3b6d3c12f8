r"""Adapters that make flowguard feel native in other libraries, a package for each host.

Nothing is imported, and no host is touched, before :func:`flowguard.register` is called or one of
``flowguard.integrations.<host>`` is imported.
"""
