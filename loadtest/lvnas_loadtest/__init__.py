"""Load tests for OpenAI-compatible servers of many adapters: Locust users that time every streamed token.

`lvnas loadtest` runs Locust in its own process, because Locust patches sockets when it is imported.
Only `locustfile.py` and what it alone imports may import Locust or gevent.
"""
