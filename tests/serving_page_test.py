"""The server's page as a browser shows it (marker browser; needs Chromium and its driver)."""

import re
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from tests import serving

pytestmark = pytest.mark.browser
FLAGS = ('--headless=new', '--no-sandbox', '--disable-gpu', '--window-size=1100,1200')


@pytest.fixture(scope='module')
def address():
  with serving.running() as (address, _):
    yield address


@pytest.fixture(scope='module')
def browser():
  driver = shutil.which('chromedriver')
  assert driver, 'the driver of Chromium is not installed (Debian: apt-get install chromium-driver)'
  options = webdriver.ChromeOptions()
  for flag in FLAGS:
    options.add_argument(flag)
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  browser = webdriver.Chrome(options=options, service=Service(driver))
  yield browser
  browser.quit()


@pytest.fixture
def page(browser, address):
  """The page, which must have nothing to complain about."""
  browser.get(address)
  until(browser, lambda: browser.find_element(By.ID, 'model').text == 'tiny')
  yield browser
  assert browser.get_log('browser') == []


def until(browser, holds) -> None:
  WebDriverWait(browser, 30).until(lambda _: holds())


def by_id(browser, name: str):
  return browser.find_element(By.ID, name)


def tokens(browser, column: int = 0) -> list:
  return browser.find_elements(By.CLASS_NAME, 'text')[column].find_elements(By.TAG_NAME, 'span')


def slide(browser, name: str, value: float) -> None:
  browser.execute_script(
    "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))",
    by_id(browser, name),
    value,
  )


def go(browser, prompt: str) -> None:
  box = by_id(browser, 'prompt')
  box.clear()
  box.send_keys(prompt)
  by_id(browser, 'go').click()
  until(browser, lambda: by_id(browser, 'go').is_enabled())


def test_text_streams_in_the_colours_of_its_depth(page):
  slide(page, 'max_tokens-a', 12)
  slide(page, 'temperature-a', 0)
  go(page, 'the boats ')
  expected = serving.post(
    page.current_url.rstrip('/'),
    '/v1/completions',
    {'model': 'tiny', 'prompt': 'the boats ', 'max_tokens': 12, 'temperature': 0, 'depths': True},
  ).json()['choices'][0]
  shown = tokens(page)
  assert len(shown) == 22
  depths = expected['depths']['prompt'] + expected['depths']['tokens']
  classes = [span.get_attribute('class').split()[0] for span in shown]
  assert classes == [f'd{depth}' for depth in depths] + ['waits']
  colours = {span.value_of_css_property('background-color') for span in shown[:-1]}
  assert len(colours) == len(set(depths)) == 2
  line = page.find_element(By.CSS_SELECTOR, '#columns .line').text
  assert line.startswith(
    f'12 tokens, mean depth {sum(depths) / len(depths):.2f} of 2; {sum(depths)} of 42 passes'
  )


def test_pointing_shows_what_each_recursion_would_have_said(page):
  slide(page, 'max_tokens-a', 6)
  go(page, 'the boats ')
  ActionChains(page).move_to_element(tokens(page)[3]).perform()
  text = by_id(page, 'look').text
  assert '(prompt), probability' in text
  first, second = page.find_elements(By.CSS_SELECTOR, '#look table')
  assert len(first.find_elements(By.CSS_SELECTOR, 'tbody tr')) == 2
  assert '(where it left)' in first.text
  assert 'router logit' in second.text
  assert re.search(r'1 -?\d+\.\d{3} 0\.000 taken', second.text)
  tokens(page)[0].send_keys(Keys.ARROW_RIGHT)  # by keyboard, from the first one
  assert page.switch_to.active_element == tokens(page)[1]
  assert by_id(page, 'look').text != text


def test_two_settings_beside_each_other(page):
  by_id(page, 'compare').click()
  slide(page, 'max_tokens-a', 8)
  slide(page, 'temperature-b', 0)
  assert by_id(page, 'max_recursions-b').get_attribute('value') == '1', 'they begin with what differs most'
  go(page, 'the boats ')
  full, shallow = (
    {span.get_attribute('class').split()[0] for span in tokens(page, column)[:-1]} for column in (0, 1)
  )
  assert shallow == {'d1'}
  assert 'd2' in full


def test_an_error_is_shown(page):
  go(page, 'a' * 64)
  assert 'prompt has 64 tokens' in by_id(page, 'error').text
  # The browser notes that the answer was 400, which is not ours to prevent.
  assert [entry['message'] for entry in page.get_log('browser') if '400' not in entry['message']] == []


@pytest.mark.parametrize('width', [1300, 480])
def test_nothing_is_wider_than_the_window(page, width):
  page.set_window_size(width, 1000)
  slide(page, 'max_tokens-a', 30)
  go(page, 'a-very-long-word-without-any-space')
  assert page.execute_script('return document.documentElement.scrollWidth') <= width
