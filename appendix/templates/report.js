// The report's only script; the page allows it by its hash. It adds menus for category and zooms,
// the keys j and k, and the rating mode, which asks what ViGoRL's human study asked. It makes
// elements from text and never reads text as HTML.
const cards = [...document.querySelectorAll('article')];
const bar = document.querySelector('nav div + div');
const menus = [];                       // for each menu: does it let a card through?

// An element with these properties and children.
function make(tag, properties, ...children) {
  const element = document.createElement(tag);
  Object.assign(element, properties);
  element.append(...children);
  return element;
}

// ---------------------------------------------------------------------------
// menus

function showCards() {
  for (const card of cards) {
    card.hidden = !menus.every(shows => shows(card));
  }
}

// A menu of all values that cards have; valuesOf(card) lists those of a card.
function addMenu(name, valuesOf) {
  const values = [...new Set(cards.flatMap(valuesOf))].sort();
  if (values.length < 2) {
    return;
  }
  const menu = make('select', {ariaLabel: name, onchange: showCards});
  menu.append(make('option', {value: ''}, 'any ' + name));
  for (const value of values) {
    menu.append(make('option', {value}, value));
  }
  menus.push(card => !menu.value || valuesOf(card).includes(menu.value));
  bar.append(menu);
}

function categoriesOf(card) {
  return card.dataset.category.split('\n');
}

function zoomsOf(card) {
  const n = card.dataset.zooms;
  return [n === '1' ? '1 zoom' : n + ' zooms'];
}

// ---------------------------------------------------------------------------
// rating mode

const saveButton = make('button', {hidden: true, onclick: saveRatings}, 'save ratings');

function toggleRating() {
  const rating = document.body.classList.toggle('rating');
  saveButton.hidden = !rating;
  const unasked = document.querySelectorAll('.turn:not(.plain):not(:has(fieldset))');
  unasked.forEach((turn, n) => {
    addQuestion(turn, 'right' + n, 'right', 'Is this point right?', ['yes', 'no', 'unsure']);
    addQuestion(turn, 'helps' + n, 'helps', 'Does it help? (1: not at all, 5: very much)',
                ['1', '2', '3', '4', '5']);
  });
}

function addQuestion(turn, name, className, text, values) {
  const question = make('fieldset', {}, make('legend', {}, text));
  for (const value of values) {
    const choice = make('input', {type: 'radio', name, className, value});
    question.append(make('label', {}, choice, ' ' + value));
  }
  turn.append(question);
}

function ratingOf(turn) {
  const card = turn.closest('article');
  const section = turn.closest('section');
  const answer = className => turn.querySelector('.' + className + ':checked')?.value ?? null;
  return {
    section: section.querySelector('h2').textContent,
    id: card.dataset.id,
    episode: [...section.querySelectorAll('article')].indexOf(card) + 1,
    turn: Number(turn.querySelector('.number').textContent),
    right: answer('right'),
    helps: Number(answer('helps')) || null,
  };
}

function saveRatings() {
  const rated = [...document.querySelectorAll('.turn:has(:checked)')];
  const ratings = {report: document.title, ratings: rated.map(ratingOf)};
  const file = new Blob([JSON.stringify(ratings, null, 1)], {type: 'application/json'});
  make('a', {href: URL.createObjectURL(file), download: 'ratings.json'}).click();
}

// ---------------------------------------------------------------------------
// keys

function onKey(event) {
  const step = {j: 1, k: -1}[event.key];
  const modified = event.ctrlKey || event.metaKey || event.altKey;
  if (!step || modified || event.target.tagName === 'SELECT') {
    return;
  }
  const shown = cards.filter(card => card.offsetParent);
  const here = shown.indexOf(event.target.closest('article'));
  shown[here + step]?.focus();
}

document.addEventListener('keydown', onKey);
if (bar) {
  addMenu('category', categoriesOf);
  addMenu('zooms', zoomsOf);
  if (document.querySelector('.turn:not(.plain)')) {
    bar.append(make('button', {onclick: toggleRating}, 'rate points'), saveButton);
  }
}
