"""SQLAlchemy: ORM and Core, its pool, several engines."""

from __future__ import annotations

import threading
from typing import Any

from calling import main
from sqlalchemy import Engine, ForeignKey, String, create_engine, event, exc, func, insert, select, text, update
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship
from sqlalchemy.pool import QueuePool


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    books: Mapped[list[Book]] = relationship(back_populates="author", cascade="all, delete-orphan")


class Book(Base):
    __tablename__ = "book"
    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author] = relationship(back_populates="books")


def engine_on(path: str, **options: Any) -> Engine:
    """As SQLAlchemy's documentation has it for SQLite: foreign keys are kept, BEGIN takes the write lock at once."""
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 30}, **options)

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def orm(path: str) -> Any:
    """Objects, relations, cascades; a session and a savepoint in it are rolled back."""
    engine = engine_on(path)
    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Author(name="Le Guin", books=[Book(title="The Dispossessed"), Book(title="Lavinia")]))
        session.add(Author(name="Lem", books=[Book(title="Solaris")]))
    with Session(engine) as session, session.begin():
        try:
            with session.begin_nested():
                session.add(Author(name="Lem"))
                session.flush()
        except exc.IntegrityError:
            session.add(Author(name="Strugatsky", books=[Book(title="Roadside Picnic")]))
    with Session(engine) as session:
        session.delete(session.scalars(select(Author).filter_by(name="Lem")).one())
        session.flush()
        gone = session.scalar(select(func.count()).select_from(Book))
        session.rollback()
        authors = session.scalars(select(Author).order_by(Author.name)).all()
        found = {author.name: sorted(book.title for book in author.books) for author in authors}
    engine.dispose()
    return [gone, found]


def core(path: str, count: str) -> Any:
    """Statements without objects: many rows at once, RETURNING, UPDATE with a subquery, a rollback."""
    engine = engine_on(path)
    books, authors = Book.__table__, Author.__table__
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        new = insert(authors).values(name="many").returning(authors.c.id)
        author = connection.execute(new).scalar_one()
        rows = [{"title": f"book {i}", "author_id": author} for i in range(int(count))]
        connection.execute(insert(books), rows)
    with engine.connect() as connection:
        connection.execute(update(books).values(title="all the same"))
        connection.rollback()
        try:
            connection.execute(insert(books).values(title="by nobody", author_id=-1))
            refused = "accepted"
        except exc.IntegrityError as error:
            refused = str(error.orig)
        connection.rollback()
        distinct = connection.scalar(select(func.count(func.distinct(books.c.title))))
    engine.dispose()
    return [distinct, refused]


def engines(path: str, other: str, workers: str, times: str) -> Any:
    """Threads that share a pool of three connections, and a second engine on another mount of the same database."""
    here, there = engine_on(path, poolclass=QueuePool, pool_size=3, max_overflow=0, pool_timeout=60), engine_on(other)
    with here.begin() as connection:
        connection.execute(text("CREATE TABLE counter(engine PRIMARY KEY, n)"))
        connection.execute(text("INSERT INTO counter VALUES ('here', 0), ('there', 0), ('both', 0)"))
    errors: list[str] = []

    def count(engine: Engine, name: str) -> None:
        try:
            for _ in range(int(times)):
                with engine.begin() as connection:
                    both = connection.scalar(text("SELECT n FROM counter WHERE engine = 'both'"))
                    connection.execute(text("UPDATE counter SET n = :n WHERE engine = 'both'"), {"n": both + 1})
                    connection.execute(text("UPDATE counter SET n = n + 1 WHERE engine = :name"), {"name": name})
        except exc.SQLAlchemyError as error:
            errors.append(repr(error))

    running = [threading.Thread(target=count, args=(here, "here")) for _ in range(int(workers))]
    running.append(threading.Thread(target=count, args=(there, "there")))
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    with here.connect() as connection:
        counted = dict(connection.execute(text("SELECT engine, n FROM counter")).all())
    opened = here.pool.checkedin()
    here.dispose()
    there.dispose()
    return [errors, counted, opened]


def wal(path: str) -> Any:
    """Asked for in each new connection, as many programs do; who waits for nobody, and reads beside a writer."""
    engine = create_engine(f"sqlite:///{path}", connect_args={"timeout": 0})

    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    Base.metadata.create_all(engine)
    with Session(engine) as session, session.begin():
        session.add(Author(name="one"))
    with Session(engine) as session, session.begin():
        session.add(Author(name="two"))
        session.flush()
        with Session(engine) as reader:
            before = reader.scalars(select(Author.name)).all()
    with Session(engine) as session:
        session.add(Author(name="three"))
        session.flush()
        session.rollback()
        names = session.scalars(select(Author.name).order_by(Author.name)).all()
    with engine.connect() as connection:
        modes = [connection.exec_driver_sql(f"PRAGMA {each}").scalar_one() for each in ("journal_mode", "synchronous")]
    engine.dispose()
    return [modes, list(before), list(names)]


def until_it_fails(path: str) -> Any:
    """Commits of two rows each, said one by one, until the daemon is killed; Enter when there is a mount again. What
    the connection of before says then, and how many rows there are over a new one."""
    engine = engine_on(path, pool_pre_ping=True)
    Base.metadata.create_all(engine)
    number = 0
    try:
        while True:
            number += 1
            with Session(engine) as session, session.begin():
                session.add(Author(name=f"{number}", books=[Book(title=f"book {number}")]))
            print(number, flush=True)
    except exc.OperationalError as error:
        print("ended", str(error.orig), flush=True)
    input()
    try:
        with Session(engine) as session:
            session.scalars(select(Author)).first()
        before = "works"
    except exc.OperationalError as error:
        before = str(error.orig)
    engine.dispose()
    with Session(engine) as session, session.begin():
        session.add(Author(name="after", books=[Book(title="after")]))
        session.flush()
        counts = [session.scalar(select(func.count()).select_from(table)) for table in (Author, Book)]
    engine.dispose()
    return [before, counts]


if __name__ == "__main__":
    main(globals())
