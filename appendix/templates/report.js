// The report's only script; the page allows it by its hash. It adds menus for category and zooms,
// the keys j and k, and the rating mode, which asks what ViGoRL's human study asked. It makes
// elements from text and never reads text as HTML.
const cards = [...document.querySelectorAll('article[data-id]')];
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
// rating mode: verdicts, rewards and which run it is are hidden (by report.css); the browser keeps
// what was rated under a key that is this page's own

const storageKey = 'ratings ' + document.querySelector('main').dataset.rated;
const turns = [...document.querySelectorAll('.turn:not(.plain)')];
const ratings = keptRatings();          // {place of a turn: {right, helps}}
const rateButton = make('button', {onclick: toggleRating}, 'rate points');
const progress = make('span', {className: 'rates', ariaLive: 'polite'});
let kept = true;                        // did the browser store the ratings?

function keptRatings() {
  try {
    return JSON.parse(localStorage.getItem(storageKey)) ?? {};
  } catch {
    return {};                          // the browser stores nothing for this page
  }
}

function keepRatings() {
  try {
    localStorage.setItem(storageKey, JSON.stringify(ratings));
    kept = true;
  } catch {
    kept = false;
  }
  showStatus();
}

function showStatus() {
  const n = turns.filter(turn => placeOf(turn) in ratings).length;
  const where = kept ? 'kept in this browser' : 'not kept: download them before you leave';
  progress.textContent = `${n} of ${turns.length} points rated, ${where}`;
}

function toggleRating() {
  const rating = document.body.classList.toggle('rating');
  rateButton.textContent = rating ? 'end rating' : 'rate points';
  if (rating) {
    document.getElementById('all').checked = true;      // a filter by verdict would tell
  }
  if (!document.querySelector('fieldset')) {
    turns.forEach(addQuestions);
  }
  showStatus();
}

function addQuestions(turn) {
  addQuestion(turn, 'right', 'Is this point right?', ['yes', 'no', 'unsure']);
  addQuestion(turn, 'helps', 'Does it help? (1: not at all, 5: very much)',
              ['1', '2', '3', '4', '5']);
}

function addQuestion(turn, asked, text, values) {
  const question = make('fieldset', {}, make('legend', {}, text));
  const place = placeOf(turn);
  const before = ratings[place]?.[asked];
  for (const value of values) {
    const choice = make('input', {type: 'radio', name: asked + place, value});
    choice.checked = value === before;
    choice.onchange = () => rate(place, asked, value);
    question.append(make('label', {}, choice, ' ' + value));
  }
  turn.append(question);
}

function rate(place, asked, value) {
  ratings[place] = {...ratings[place], [asked]: value};
  keepRatings();
}

// The section, the episode in it and the turn: "s0/1/2".
function placeOf(turn) {
  return [turn.closest('section').id, episodeOf(turn), numberOf(turn)].join('/');
}

function episodeOf(turn) {
  const episodes = [...turn.closest('section').querySelectorAll('article[data-id]')];
  return episodes.indexOf(turn.closest('article')) + 1;
}

function numberOf(turn) {
  return Number(turn.querySelector('.number').textContent);
}

function ratingOf(turn) {
  const rated = ratings[placeOf(turn)];
  return {
    section: turn.closest('section').querySelector('h2').textContent,
    id: turn.closest('article').dataset.id,
    episode: episodeOf(turn),
    turn: numberOf(turn),
    right: rated.right ?? null,
    helps: Number(rated.helps) || null,
  };
}

function downloadRatings() {
  const rated = turns.filter(turn => placeOf(turn) in ratings).map(ratingOf);
  const text = JSON.stringify({report: document.title, ratings: rated}, null, 1);
  const file = new Blob([text], {type: 'application/json'});
  make('a', {href: URL.createObjectURL(file), download: 'ratings.json'}).click();
}

function deleteRatings() {
  if (!confirm('Delete all ratings of this page that this browser keeps?')) {
    return;
  }
  for (const place of Object.keys(ratings)) {
    delete ratings[place];
  }
  document.querySelectorAll('fieldset input').forEach(choice => { choice.checked = false; });
  keepRatings();
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
  if (turns.length) {
    bar.append(
      rateButton,
      make('button', {className: 'rates', onclick: downloadRatings}, 'download ratings'),
      make('button', {className: 'rates', onclick: deleteRatings}, 'delete ratings'),
      progress);
  }
}
