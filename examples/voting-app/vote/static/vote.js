// Votes without leaving the page. Without JavaScript the form does the same.
const ballot = document.getElementById("ballot");
const status = document.getElementById("status");
const choices = [...ballot.querySelectorAll(".choice")];

ballot.addEventListener("submit", async (event) => {
  event.preventDefault();
  const chosen = event.submitter;
  const say = (text, problem) => {
    status.textContent = text;
    status.classList.toggle("problem", problem);
  };
  ballot.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch("/", {
      method: "POST",
      headers: { Accept: "application/json" },
      body: new URLSearchParams({ vote: chosen.value }),
    });
    if (!answer.ok) throw new Error(answer.statusText);
    for (const c of choices) c.setAttribute("aria-pressed", String(c === chosen));
    ballot.classList.add("voted");
    say(`You voted for ${chosen.dataset.name}. You can change your mind at any time.`, false);
  } catch {
    say("Your vote could not be taken. Please try again in a moment.", true);
  } finally {
    ballot.removeAttribute("aria-busy");
  }
});
