// What the theme leaves unclear to a screen reader.
document.addEventListener("DOMContentLoaded", () => {
  // The search button's label says "Search", its face "Search Ctrl+K": the face is the better name.
  for (const button of document.querySelectorAll("button.search-button-field")) {
    button.removeAttribute("aria-label");
  }
  // The title above the chapters stands outside of every landmark.
  document.querySelector(".bd-sidebar-primary a.navbar-brand")?.parentElement.setAttribute("role", "banner");
  // A list's children are list items; the role that they come with is retired.
  for (const entry of document.querySelectorAll("[role=list] > [role=doc-biblioentry]")) {
    entry.setAttribute("role", "listitem");
  }
});
