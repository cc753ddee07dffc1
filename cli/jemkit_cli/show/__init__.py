"""`jemkit show`: a local page on which one looks at a trained model.

`command` is the command, `model` opens what is shown, `looking` and `chains` compute, `received`
checks what a browser sends, `drawing` makes markup of results. `page` and `server` alone import
gradio.
"""
