"""The rating page as a Gradio app. Gradio draws the frame; the place inside it is filled by ``static/label.js``.

The place is one empty column: no text from the study goes through Gradio, no handler of Gradio is called, and the state
is in the database alone. What a rater sees and sends goes through the routes of ``api``. ``gr.HTML`` would be the
obvious choice, but it compiles its template in the browser, which our Content-Security-Policy rightly forbids.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

# Read when gradio is imported: no telemetry.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr

if TYPE_CHECKING:
    from fastapi import FastAPI

PATH = "/rate"
LIGHT, DARK = "#f1f1f0", "#2b2b2b"
"""The grounds of the page, so that nothing flashes, and none of Gradio's words are seen, before it is there."""
PLACE = "rating"
"""The id of the element that ``label.js`` waits for."""
HEAD = """
<link rel="icon" href="/static/icon.svg">
<link rel="stylesheet" href="/static/label.css">
<link rel="stylesheet" href="/static/stage.css">
<link rel="stylesheet" href="/static/form.css">
<link rel="stylesheet" href="/static/dialogs.css">
<script type="module" src="/static/label.js"></script>
"""
FONTS = ("system-ui", "sans-serif")
"""Of Gradio's own frame; a font by name would be fetched from its maker."""


def mount(app: FastAPI) -> FastAPI:
    """The app with the page at ``/rate``."""
    with gr.Blocks(analytics_enabled=False, title="diffalign", fill_height=True, fill_width=True) as page:
        gr.Column(elem_id=PLACE)
    mounted: FastAPI = gr.mount_gradio_app(
        app,
        page,
        path=PATH,
        theme=gr.themes.Base(font=FONTS, font_mono=FONTS).set(
            body_background_fill=LIGHT,
            body_background_fill_dark=DARK,
            body_text_color=LIGHT,
            body_text_color_dark=DARK,
        ),
        head=HEAD,
        show_error=False,
        ssr_mode=False,
        footer_links=[],
        run_history=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        allowed_paths=[],
        auth_dependency=lambda request: request.state.user,
    )
    return mounted
