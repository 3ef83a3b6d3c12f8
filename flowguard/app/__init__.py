r"""The page to try: photographs, what is done to them, and what affine and robust flows make of it.

What is shown is made by functions that know no page (:mod:`flowguard.app.conditions`,
:mod:`~flowguard.app.answers`, :mod:`~flowguard.app.toy`, :mod:`~flowguard.app.words`,
:mod:`~flowguard.app.drawing`); :mod:`flowguard.app.page` puts them behind sliders.
"""
