"""The fifteen prompts that quality is judged on, beside the user's own question. Imports nothing.

Short, since each is read anew in every precision, and of many kinds: which prompt it is decides more about
KL than which answer is drawn. They begin a text, which a base model continues; under CHAT each is a user's
turn. Another list is another scale: figures of before do not compare with it.
"""

PROMPTS = (
    "The old lighthouse had been dark for years when",
    "清晨的小镇还没有醒来，街上只有",
    "def is_prime(n: int) -> bool:\n",
    "Question: 12 apples cost 3 euros. How much do 20 apples cost?\nAnswer:",
    '{"name": "Ada Lovelace", "born": 1815, "occupation":',
    "Dear Ms. Howard,\n\nThank you for your letter of 3 May.",
    "The capital of Australia is",
    "Customer: My parcel has not arrived.\nSupport:",
    "How to repair a flat bicycle tyre:\n1.",
    "LONDON, Monday: The government announced",
    "为什么天空是蓝色的？",
    "SELECT customer, SUM(price) FROM orders",
    "English: Where is the railway station?\n中文：",
    "Photosynthesis is the process by which",
    "Article 1. The tenant shall",
)
