// The appearance that was chosen on the rating page; else the browser's own.
try {
  const chosen = localStorage.getItem("diffalign:appearance");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A forbidden storage: the browser's own.
}

// Who comes by a link from elsewhere, as from an e-mail, brings no cookie along, for safety; from here the cookie is sent.
// This page sends on whoever is logged in: so it is asked for again, which is no error where nobody is.
(async () => {
  const next = document.querySelector("input[name=next]").value;
  if (document.querySelector("[role=alert]")) return;
  try {
    const answer = await fetch("/login", { redirect: "manual", cache: "no-store" });
    if (answer.type === "opaqueredirect") location.replace(next);
    else await answer.text(); // else the browser would go on loading it
  } catch {
    // The form is there all the same.
  }
})();
