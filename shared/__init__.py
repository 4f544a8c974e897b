"""What every image has. Importing any module of `shared` loads neither a model library nor the RunPod SDK.

For a handler:
    jobs.job_handler(*requests, routes, answers)   turns `async def work(request, job)` into a JobHandler
    jobs.Job                                 id, data, check_size(bytes, advice)
    jobs.JobHandler.streamed                 registers the generator for requests with `stream`
    startup.serve(handler, prepare, worker=) starts the worker in its SERVE_MODE; a failed load is answered
    startup.resolve(settings, name)          the folder of the model, from the volume, the image or the Hub
    startup.phase(name)                      times a part of the load in the log
    prewarm.run(handler, inputs)             sends small requests before the first job
    logs.log                                 the logger; lines have the job's id and no secrets
For schemas:
    settings.WorkerSettings, read_settings   environment variables, typed
    requests.Request, as_list                the base of a worker's own requests
    openai.OpenAIRequest, ModelsRequest, ModelList, Usage    the base of OpenAI requests, common shapes
For the work:
    errors.JobError, invalid, not_finite, engine_died        what a client receives for one job
    errors.StartError                        what every client receives after a permanent failure to start
    decoding.load_bytes, decode_base64, too_large            bytes from base64, a data: URI or a URL
    requests.MediaSource, results.Media      media in a request, and an answer that HTTP sends as bytes
    telemetry.observe(name, value)           a measurement of the running job
    openai.check_model, model_list, usage, sse, DONE         parts of OpenAI answers
    device.pick_device, parallel_batches, share_cores, is_out_of_memory, is_cuda_broken, empty_cache
"""
